"""MMTok: keep tokens that cover the user's text and the image (arXiv 2508.18264, Ironieser/MMTok)."""

import torch
from torch import Tensor

from dualspeed.pruners.contract import Pruner, VisualTokens
from dualspeed.pruners.coverage import greedy_cover
from dualspeed.pruners.selection import sort_picks
from dualspeed.pruners.similarity import cosine_similarity

TEXT_TEMPERATURE, IMAGE_TEMPERATURE = 0.02, 0.2
IMAGE_WEIGHT = 0.5
"""Weight of covering the image; that of covering the text is 1."""


@torch.no_grad()
def mmtok(tokens: VisualTokens, num_keep: Tensor) -> Tensor:
    """Greedily add the token with the largest gain in covering the text's tokens and the image's tokens.

    A token covers a word, or another token, by its share in a softmax over the image's tokens: of their cosines to the
    word (projected features), or to the token (features before the projector). Words are as in
    dualspeed.method.keywords; their similarity comes from the language model or from CLIP (dualspeed.method.relevance).
    Different from the repository: the words' embeddings are those of the text as one string, not of one word at a time;
    an image without text covers itself alone; tokens without features before the projector (newlines) cover nothing,
    need no covering and are kept last; in images of 1,024 or more tokens, gains are computed anew only where they can
    decide.
    """
    is_patch = tokens.valid() & (tokens.require("pre_projection") != 0).any(dim=-1)
    covers = torch.cat([text_coverage(tokens, is_patch), IMAGE_WEIGHT * image_coverage(tokens, is_patch)], dim=2)
    weight = torch.where(is_patch, 1.0, -1.0)
    return sort_picks(greedy_cover(covers, weight, tokens.valid(), int(num_keep.max())), num_keep)


def text_coverage(tokens: VisualTokens, is_patch: Tensor) -> Tensor:
    """(B, N, T) degree to which each token covers each text token: the sum over tokens is 1 / T_i, T_i of image i."""
    similarity = tokens.require("text_similarity").float()
    is_text = (similarity > -torch.inf).any(dim=1, keepdim=True)
    shares = token_shares(similarity.masked_fill(~is_text, 0.0), is_patch, TEXT_TEMPERATURE)
    return (shares / is_text.sum(dim=2, keepdim=True).clamp(min=1)).masked_fill_(~is_text, 0.0)


def image_coverage(tokens: VisualTokens, is_patch: Tensor) -> Tensor:
    """(B, N, N) degree to which each token covers each patch of its image: the sum over tokens is 1 / N_i patches."""
    shares = token_shares(cosine_similarity(tokens.require("pre_projection")), is_patch, IMAGE_TEMPERATURE)
    return (shares / is_patch.sum(dim=1)[:, None, None].clamp(min=1)).masked_fill_(~is_patch[:, None], 0.0)


def token_shares(similarity: Tensor, is_patch: Tensor, temperature: float) -> Tensor:
    """(B, N, R) softmax of similarities over an image's patches; 0 for its other tokens."""
    # Finite, so that an image without patches gives no NaN.
    lowest = torch.finfo(similarity.dtype).min
    shares = (similarity / temperature).masked_fill_(~is_patch[..., None], lowest).softmax(dim=1)
    return shares.masked_fill_(~is_patch[..., None], 0.0)


PRUNER = Pruner(
    mmtok,
    keeps="the tokens that cover the question's words and the image best",
    paper="2508.18264",
    needs=("pre_projection", "text_similarity"),
)
