"""The pruning methods as their papers and repositories have them: one image at a time, plain loops.

Each function follows the published algorithm, except for the differences that the docstring of our pruner of the same
name lists. The tests compare our pruners with these functions, and measurements/pruners.py times both. Arguments are
fields of VisualTokens for one image, and k tokens to keep: features (N, D), cls_attention and relevance (N,), keys
(N, H, d), pre_projection (N, C). Selecting methods return sorted indices, merging methods indices and vectors (K, D).
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize


def fields_of(algorithm: Callable) -> list[str]:
    """Fields of VisualTokens that a function of this module takes, in order."""
    return list(inspect.signature(algorithm).parameters)[:-1]


def cosines(vectors: Tensor) -> Tensor:
    """(N, D) -> (N, N) cosine similarity."""
    unit = normalize(vectors, dim=-1)
    return unit @ unit.T


def best_first(scores: Tensor) -> list[int]:
    """Indices from the highest score to the lowest."""
    return scores.argsort(descending=True, stable=True).tolist()


def in_image_order(vectors: dict[int, Tensor]) -> tuple[list[int], Tensor]:
    """Sorted indices and their vectors (K, D)."""
    order = sorted(vectors)
    return order, torch.stack([vectors[i] for i in order])


def divprune(features: Tensor, k: int) -> list[int]:
    distance = 1 - cosines(features)
    to_others = distance.clone().fill_diagonal_(torch.inf).amin(dim=1)
    picked = [int(to_others.argmax())]
    while len(picked) < k:
        to_picked = distance[picked].amin(dim=0)
        to_picked[picked] = -torch.inf
        picked.append(int(to_picked.argmax()))
    return sorted(picked)


def fastervlm(cls_attention: Tensor, k: int) -> list[int]:
    return sorted(best_first(cls_attention)[:k])


def cdpruner(features: Tensor, relevance: Tensor, k: int) -> list[int]:
    """Greedily maximise the determinant, with a factorisation that each pick updates."""
    quality = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    kernel = quality[:, None] * cosines(features) * quality[None]
    gain, rows, picked = kernel.diagonal().clone(), [], []
    while True:
        best = int(gain.argmax())
        picked.append(best)
        if len(picked) == k:
            return sorted(picked)
        explained = sum((row[best] * row for row in rows), torch.zeros_like(gain))
        rows.append((kernel[best] - explained) / gain[best].sqrt())
        gain -= rows[-1].square()
        gain[picked] = -torch.inf


def visionzip(features: Tensor, cls_attention: Tensor, keys: Tensor, k: int) -> tuple[list[int], Tensor]:
    num_contextual = k * 10 // 64
    dominant = best_first(cls_attention)[: k - num_contextual]
    vectors = {i: features[i] for i in dominant}
    if num_contextual:
        rest = [i for i in range(len(features)) if i not in set(dominant)]
        targets = rest[:: max(1, len(rest) // num_contextual)][:num_contextual]
        similarity = cosines(keys.mean(dim=1))
        joined: dict[int, list[int]] = {target: [] for target in targets}
        for i in rest:
            if i not in joined:
                joined[targets[int(similarity[i, targets].argmax())]].append(i)
        for target, others in joined.items():
            vectors[target] = features[target] + (features[others].mean(dim=0) if others else 0)
    return in_image_order(vectors)


def prumerge(features: Tensor, cls_attention: Tensor, keys: Tensor, k: int) -> tuple[list[int], Tensor]:
    """Defined for 1 < k < N."""
    return merge_neighbours(features, cls_attention, keys, best_first(cls_attention)[: k - 1])


def prumerge_plus(features: Tensor, cls_attention: Tensor, keys: Tensor, k: int) -> tuple[list[int], Tensor]:
    """Defined for 1 < k < N."""
    num_spaced = (k - 1) // 2
    attended = best_first(cls_attention)[: k - 1 - num_spaced]
    others = [i for i in range(len(features)) if i not in set(attended)]
    spaced = [others[int((j + 0.5) * len(others) / num_spaced)] for j in range(num_spaced)]
    return merge_neighbours(features, cls_attention, keys, attended + spaced)


def merge_neighbours(
    features: Tensor, cls_attention: Tensor, keys: Tensor, kept: list[int]
) -> tuple[list[int], Tensor]:
    """Add to each kept token its 32 nearest ones, and sum the others into the most attended of them."""
    similarity = cosines(keys.flatten(1))
    vectors = {}
    for i in kept:
        neighbours = [j for j in best_first(similarity[i]) if j != i][:32]
        vectors[i] = features[i] + cls_attention[neighbours] @ features[neighbours]
    rest = [i for i in best_first(cls_attention) if i not in vectors]
    vectors[rest[0]] = cls_attention[rest] @ features[rest]
    return in_image_order(vectors)


def vispruner(cls_attention: Tensor, pre_projection: Tensor, k: int) -> list[int]:
    similarity = cosines(pre_projection)
    by_attention, num_important = best_first(cls_attention), int(k * 0.5)
    important, residual = by_attention[:num_important], by_attention[num_important:]
    while (num_removed := min(8, len(residual) - (k - num_important))) > 0:
        evens, odds = residual[::2], residual[1::2]
        closeness = similarity[evens][:, odds].amax(dim=1)
        residual = [evens[i] for i in best_first(closeness)][num_removed:] + odds
    return sorted(important + residual)


def tome(features: Tensor, k: int) -> tuple[list[int], Tensor]:
    clusters = {i: [i] for i in range(len(features))}
    while (num_merges := min(len(clusters) - k, len(clusters) // 2)) > 0:
        order, means = in_image_order({i: features[members].mean(dim=0) for i, members in clusters.items()})
        similarity = cosines(means)[::2, 1::2]
        for source in best_first(similarity.amax(dim=1))[:num_merges]:
            target = int(similarity[source].argmax())
            clusters[order[1::2][target]] += clusters.pop(order[::2][source])
    return in_image_order({i: features[members].mean(dim=0) for i, members in clusters.items()})


def spatial_pool(features: Tensor, k: int) -> tuple[list[int], Tensor]:
    stretches: list[list[int]] = [[] for _ in range(k)]
    for i in range(len(features)):
        stretches[i * k // len(features)].append(i)
    return in_image_order({members[0]: features[members].mean(dim=0) for members in stretches})


def uniform(features: Tensor, k: int) -> list[int]:
    return [int((j + 0.5) * len(features) / k) for j in range(k)]


def random(features: Tensor, k: int) -> list[int]:
    return sorted(torch.randperm(len(features))[:k].tolist())
