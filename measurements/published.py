"""The pruning methods as their papers and repositories have them: one image at a time, plain loops.

Each function follows the published algorithm, except for the differences that the docstring of our pruner of the same
name lists. The tests compare our pruners with these functions, and measurements/pruners.py times both. Arguments are
fields of VisualTokens for one image, and k tokens to keep: features (N, D), cls_attention and relevance (N,), keys
(N, H, d), pre_projection and before_merger (N, C), text_similarity (N, T). Selecting methods return sorted indices,
merging methods indices and vectors (K, D). A function that ends in `_of_merger` is the form for towers with a merger.
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


def centred_cosines(vectors: Tensor) -> Tensor:
    return cosines(vectors - vectors.mean(dim=0))


def mean_distinctness(vectors: Tensor) -> Tensor:
    """Minus each token's mean cosine to the others."""
    similarity = cosines(vectors).fill_diagonal_(0)
    return -similarity.sum(dim=1) / max(1, len(vectors) - 1)


def divprune_cen(features: Tensor, k: int) -> list[int]:
    return centred_divprune(features, min_max(mean_distinctness(features)), k)


def divprune_cen_of_merger(before_merger: Tensor, k: int) -> list[int]:
    return centred_divprune(before_merger, sigmoid_of_z(mean_distinctness(before_merger)), k)


def centred_divprune(vectors: Tensor, weight: Tensor, k: int) -> list[int]:
    picked, distance = divprune(vectors, 1), 1 - centred_cosines(vectors)
    while len(picked) < k:
        scores = weight * distance[picked].amin(dim=0)
        scores[picked] = -torch.inf
        picked.append(int(scores.argmax()))
    return sorted(picked)


def cdpruner_cen(features: Tensor, relevance: Tensor, k: int) -> list[int]:
    quality = min_max(relevance) * min_max(mean_distinctness(features))
    return largest_determinant(quality[:, None] * centred_cosines(features) * quality[None], k)


def cdpruner_cen_of_merger(before_merger: Tensor, relevance: Tensor, k: int) -> list[int]:
    quality = min_max(relevance) * sigmoid_of_z(mean_distinctness(before_merger))
    return largest_determinant(quality[:, None] * centred_cosines(before_merger) * quality[None], k)


def sigmoid_of_z(values: Tensor) -> Tensor:
    return ((values - values.mean()) / values.std(correction=0)).sigmoid()


def scope(cls_attention: Tensor, pre_projection: Tensor, k: int) -> list[int]:
    return largest_coverage(cosines(pre_projection), cls_attention, k)


def mmtok(pre_projection: Tensor, text_similarity: Tensor, k: int) -> list[int]:
    words = text_similarity.T[(text_similarity > -torch.inf).all(dim=0)]
    text = (words / 0.02).softmax(dim=1) / max(1, len(words))
    image = (cosines(pre_projection) / 0.2).softmax(dim=1) / len(pre_projection)
    return largest_coverage(torch.cat([text, 0.5 * image]), pre_projection.new_ones(len(pre_projection)), k)


def largest_coverage(covers: Tensor, weight: Tensor, k: int) -> list[int]:
    """Greedily pick columns of `covers` (R, N): the token whose column rises most above what is covered."""
    covered, picked = covers.new_zeros(len(covers)), []
    for _ in range(k):
        gain = weight * (covers - covered[:, None]).clamp(min=0).sum(dim=0)
        gain[picked] = -torch.inf
        picked.append(int(gain.argmax()))
        covered = torch.maximum(covered, covers[:, picked[-1]])
    return sorted(picked)


def otprune(features: Tensor, k: int) -> list[int]:
    columns = features / features.norm(dim=0)
    products = columns @ columns.T
    return largest_determinant(torch.eye(len(features), device=features.device) + 0.01 * products @ products.T, k)


def fastervlm(cls_attention: Tensor, k: int) -> list[int]:
    return sorted(best_first(cls_attention)[:k])


def cdpruner(features: Tensor, relevance: Tensor, k: int) -> list[int]:
    quality = min_max(relevance)
    return largest_determinant(quality[:, None] * cosines(features) * quality[None], k)


def min_max(values: Tensor) -> Tensor:
    """Scale to [0, 1]; the offset is CDPruner's."""
    return (values - values.min() + 1e-6) / (values.max() - values.min())


def largest_determinant(kernel: Tensor, k: int) -> list[int]:
    """Greedily maximise the determinant, with a factorisation that each pick updates."""
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
