"""The contract of all pruners: VisualTokens go in, indices or MergedTokens come out.

B images, N visual tokens per image (padded to the longest), D width of the language model, K tokens kept, H heads of
the vision tower and d their width, C width of the vision tower.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dualspeed.errors import PrunerInputError


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of B images, padded to the longest; every field but `features` is optional."""

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
    """(B, N) similarity of each token to the user's text, in any unit; higher is more similar."""
    seeds: Tensor | None = None
    """(B,) int64, one random seed per image."""

    def valid(self) -> Tensor:
        """(B, N) bool mask of tokens, all True if `mask` is None."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.features.shape[:2], dtype=torch.bool, device=self.features.device)

    def require(self, field: str, pruner: str = "this pruner") -> Tensor:
        """Return a field; PrunerInputError names `pruner` and the field if it was not given."""
        values: Tensor | None = getattr(self, field)
        if values is None:
            raise PrunerInputError(f"{pruner} needs VisualTokens.{field}, which was not given")
        return values


class MergedTokens(NamedTuple):
    """Result of a merging pruner: positions in the image and the new vectors at these positions."""

    indices: Tensor
    """(B, K) ascending, -1 beyond an image's budget."""
    features: Tensor
    """(B, K, D); gradients flow to all features that were merged."""


@dataclass(frozen=True)
class Pruner:
    """A pruning method; call it with the tokens of a batch and each image's budget.

    Every method is pure and batched: it prunes an image in a batch exactly as it prunes the image alone. It computes in
    float32, breaks ties by the lower index, and changes no token of an image that keeps all its tokens. Selection has
    no gradient; merged vectors have one.
    """

    select: Callable[[VisualTokens, Tensor], Tensor | MergedTokens]
    """The method. Arguments and result are those of `__call__`; the function has the same name as its file."""
    needs: tuple[str, ...] = ()
    """Fields of VisualTokens that the method reads beside `features` and `mask`; the model computes no others."""
    merges: bool = False
    """True if the result is MergedTokens."""

    @property
    def name(self) -> str:
        """Name of the method's function, which is also its name in settings and in PRUNERS."""
        return self.select.__name__

    def __call__(self, tokens: VisualTokens, num_keep: Tensor) -> Tensor | MergedTokens:
        """Prune a batch of images; PrunerInputError names a field of `needs` that was not given.

        Args:
            tokens: the images' visual tokens.
            num_keep: (B,) integers, the tokens to keep of each image, at least 1 and at most its valid ones.

        Returns:
            (B, K) indices, K = num_keep.max(): row b holds num_keep[b] unique valid indices in ascending order,
            followed by -1. MergedTokens, with such indices, if the method merges.
        """
        for field in self.needs:
            tokens.require(field, self.name)
        return self.select(tokens, num_keep)
