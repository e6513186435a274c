"""What a pruner sees of a batch of images, what it gives back, and the arithmetic that pruners share.

B images, N visual tokens per image (padded to the longest), D width of the language model, K tokens kept, H heads of
the vision tower and d their width, C width of the vision tower.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dualspeed.errors import PrunerInputError

STRIP = 128
"""Rows of similarities computed at once: large enough for a fast matrix product."""


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of B images, padded to the longest; only `features` is always there."""

    features: Tensor
    """(B, N, D) projected features, as the language model gets them."""
    mask: Tensor | None = None
    """(B, N) bool, True for tokens and False for padding; None: no padding."""
    cls_attention: Tensor | None = None
    """(B, N) attention from the vision tower's CLS token, mean over heads; -inf for tokens that have none."""
    keys: Tensor | None = None
    """(B, N, H, d) attention keys of the tower's layer that yields the features; 0 for tokens that have none."""
    pre_projection: Tensor | None = None
    """(B, N, C) features before the projector; 0 for tokens that have none."""
    relevance: Tensor | None = None
    """(B, N) how near each token is to the user's text, in any unit; higher is nearer."""
    seeds: Tensor | None = None
    """(B,) int64, one seed an image, for random methods."""

    def valid(self) -> Tensor:
        """(B, N) bool mask, also where none was given."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.features.shape[:2], dtype=torch.bool, device=self.features.device)

    def attention(self, num_keep: Tensor) -> tuple[Tensor, Tensor]:
        """CLS attention (B, N) in float32, -inf where it is none, and the tokens (B, N) that may be picked by it.

        Those are the ones with a score, or all valid ones of an image that has fewer with a score than it keeps.
        """
        scores = self.cls_attention.float().masked_fill(~self.valid(), -torch.inf)
        scored = scores > -torch.inf
        enough = scored.sum(dim=1) >= num_keep.to(scored.device)
        return scores, torch.where(enough[:, None], scored, self.valid())

    def check(self, pruner: str, *needs: str) -> None:
        """Raise PrunerInputError if a field that `pruner` needs was not given."""
        for name in needs:
            if getattr(self, name) is None:
                raise PrunerInputError(f"{pruner} needs VisualTokens.{name}, which was not given")


class MergedTokens(NamedTuple):
    """What a merging pruner keeps: positions in the image, and new vectors that stand there."""

    indices: Tensor
    """(B, K) ascending, -1 beyond an image's budget."""
    features: Tensor
    """(B, K, D); gradients reach the features that were merged."""


def num_tokens_to_keep(num_tokens: int, pruning_ratio: float) -> int:
    """k = max(1, floor((1 - p) N + 1e-6)); the epsilon because 1 - 0.9 is a little less than 0.1 in floats."""
    return max(1, math.floor((1 - pruning_ratio) * num_tokens + 1e-6))


def inner_products(vectors: Tensor) -> Tensor:
    """(B, N, D) -> (B, N, N) in float32, exactly symmetric.

    Strips of rows from the diagonal on, the rest mirrored: little more than half of the whole product's arithmetic.
    """
    vectors = vectors.float()
    columns = vectors.transpose(1, 2)
    products = vectors.new_empty(*vectors.shape[:2], vectors.shape[1])
    for start in range(0, vectors.shape[1], STRIP):
        end = start + STRIP
        strip = vectors[:, start:end] @ columns[:, :, start:]
        products[:, start:end, start:] = strip
        products[:, end:, start:end] = strip[:, :, STRIP:].transpose(1, 2)
    return products


def inverse_lengths(products: Tensor) -> Tensor:
    """(B, N, N) inner products -> (B, N) 1 / length of each vector, 0 for a zero vector."""
    squares = products.diagonal(dim1=1, dim2=2)
    return torch.where(squares > 0, squares.rsqrt(), 0.0)


def cosine_similarity(vectors: Tensor) -> Tensor:
    """(B, N, D) -> (B, N, N) in float32; a zero vector is at 0 from all others.

    Lengths are read off the products: a normalised copy of the features would be the largest tensor of a pruner.
    """
    products = inner_products(vectors)
    scale = inverse_lengths(products)
    return products.mul_(scale[:, :, None]).mul_(scale[:, None])


def pairs(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(B, R, C): the entries of each (B, N, N) matrix at its `rows` (B, R) and `columns` (B, C)."""
    # Whole rows first, which lie in one piece: much faster than picking entries.
    picked = matrix[torch.arange(len(matrix), device=matrix.device)[:, None], rows]
    return picked.gather(2, columns[:, None].expand(-1, rows.shape[1], -1))


def by_score(scores: Tensor) -> Tensor:
    """(B, N) indices from the highest score to the lowest, ties to the lower index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices


def select_top_k(scores: Tensor, num_keep: Tensor) -> Tensor:
    """Indices of the `num_keep` highest scores of each row, ascending, ties to the lower index.

    Args:
        scores: (B, N); -inf marks tokens that can't be picked.
        num_keep: (B,) integers.

    Returns:
        (B, num_keep.max()) indices, shorter rows filled with -1 at the end.
    """
    return ascending(by_score(scores)[:, : int(num_keep.max())], num_keep)


def ascending(picked: Tensor, num_keep: Tensor) -> Tensor:
    """Sort the first `num_keep` picks of each row (B, K) into image order and fill the rest of it with -1."""
    beyond = torch.iinfo(picked.dtype).max
    ordered = picked.masked_fill(~first(num_keep, picked), beyond).sort(dim=-1).values
    return ordered.masked_fill(ordered == beyond, -1)


def first(counts: Tensor, like: Tensor) -> Tensor:
    """(B, M) bool with the shape of `like`: True in the first `counts` (B,) places of each row."""
    return torch.arange(like.shape[1], device=like.device) < counts.to(like.device)[:, None]


def positions_of(mask: Tensor) -> Tensor:
    """(B, N) bool -> (B, N) the positions that are True, ascending, followed by the others."""
    return (~mask).to(torch.uint8).sort(dim=-1, stable=True).indices


def mark(mask: Tensor, indices: Tensor, chosen: Tensor) -> Tensor:
    """(B, N) like `mask`: True at those `indices` (B, M), unique in a row, whose `chosen` (B, M) is True."""
    return torch.zeros_like(mask).scatter(1, indices, chosen)


def evenly_spaced(candidates: Tensor, counts: Tensor) -> Tensor:
    """(B, N) bool: the middles of `counts` (B,) equal stretches of each image's `candidates` (B, N)."""
    num_candidates, counts = candidates.sum(dim=1, keepdim=True), counts.to(candidates.device)[:, None]
    stretch = torch.arange(candidates.shape[1], device=candidates.device)[None]
    ranks = ((2 * stretch + 1) * num_candidates).div(2 * counts.clamp(min=1), rounding_mode="floor")
    ranks, wanted = ranks.clamp(max=candidates.shape[1] - 1), (stretch < counts).expand_as(candidates)
    chosen = torch.zeros_like(ranks).scatter_add(1, ranks, wanted.long()) > 0
    return mark(candidates, positions_of(candidates), chosen)


def one_hot(indices: Tensor, num_tokens: int) -> Tensor:
    """(B, K) indices -> (B, K, N) float32 with a 1 at each, none for -1."""
    return (indices[:, :, None] == torch.arange(num_tokens, device=indices.device)).float()


def members(indices: Tensor, owners: Tensor) -> Tensor:
    """(B, K, N) float32: 1 where token n belongs to the token at `indices` (B, K); `owners` (B, N), -1 for none."""
    return ((indices[:, :, None] == owners[:, None, :]) & (indices >= 0)[:, :, None]).float()


def averages(membership: Tensor) -> Tensor:
    """(B, K, N) members -> weights of their mean; rows without a member stay 0."""
    return membership / membership.sum(dim=-1, keepdim=True).clamp(min=1)


def merge(features: Tensor, indices: Tensor, weights: Tensor) -> MergedTokens:
    """New vectors as weighted sums of `features` (B, N, D), computed in float32; `weights` (B, K, N)."""
    return MergedTokens(indices, (weights @ features.float()).to(features.dtype))
