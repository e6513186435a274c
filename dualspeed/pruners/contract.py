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
    before_merger: Tensor | None = None
    """(B, N, C) features before the merger that a tower has of its own: each dimension of the patches divided by its
    standard deviation over the image, then the mean over the square of patches that becomes a token."""
    relevance: Tensor | None = None
    """(B, N) similarity of each token to the user's text, in any unit; higher is more similar."""
    text_similarity: Tensor | None = None
    """(B, N, T) cosine of each token to each token of the user's text; -inf beyond the text of an image."""
    seeds: Tensor | None = None
    """(B,) int64, one random seed per image."""
    num_tokens: Tensor | None = None
    """(B,) tokens of each image on the CPU, so that the host knows them without waiting; None: counted from `mask`."""

    def counts(self) -> Tensor:
        """(B,) number of tokens of each image, on the CPU; one host-device sync if there is a mask alone."""
        if self.num_tokens is not None:
            return self.num_tokens
        if self.mask is not None:
            return self.mask.sum(dim=1).cpu()
        return torch.full((len(self.features),), self.features.shape[1])

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
    float32, also under autocast, breaks ties by the lower index, and changes no token of an image that keeps all its
    tokens. Selection has no gradient; merged vectors have one.
    """

    select: Callable[[VisualTokens, Tensor], Tensor | MergedTokens]
    """The method. Arguments and result are those of `__call__`; the function has the same name as its file."""
    needs: tuple[str, ...] = ()
    """Fields of VisualTokens that the method reads beside `features` and `mask`; the model computes no others."""
    merges: bool = False
    """True if the result is MergedTokens."""
    optional: tuple[str, ...] = ()
    """Fields that the method reads where the model has them, and does without elsewhere."""
    keeps: str = ""
    """Kept tokens in words, for the table of methods: "the most diverse tokens"."""
    paper: str = ""
    """The paper's arXiv id."""

    @property
    def name(self) -> str:
        """Name of the method's function, which is also its name in settings and in PRUNERS."""
        return self.select.__name__

    @property
    def reads_text(self) -> bool:
        """True if the method depends on the user's text."""
        return bool({"relevance", "text_similarity"} & set(self.needs))

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
        # Under autocast, products would be rounded to 16 bits: training would keep other tokens than inference.
        with torch.autocast(tokens.features.device.type, enabled=False):
            return self.select(tokens, num_keep)
