"""Relevance of each visual token to the user's text, for CDPruner.

The text enters as `question_ids` (B, Q): the tokens of the user's turns, in the vocabulary of the model that computes
the relevance. That is the language model or, with the setting `relevance_clip`, CLIP. P visual tokens in the batch,
D width of the language model, C width of the vision tower.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel, PreTrainedModel

from dualspeed.batch import IGNORE_INDEX, QUESTION_PADDING
from dualspeed.method.sequences import Sequences
from dualspeed.method.vlm.families import check_clip_tower


@torch.no_grad()
def relevance_by_llm(inputs: Sequences, features: Tensor, embed: nn.Module, image_token_id: int) -> Tensor:
    """(P,) mean cosine similarity of each visual token to the question's tokens, among the language model's embeddings.

    Without `question_ids` the question is every token that is attended to, no image and unsupervised, so that it
    includes the system prompt.

    Args:
        features: (P, D) projected features of the batch's images.
        embed: the language model's input embeddings.
    """
    if inputs.question_ids is not None:
        token_ids, is_question = inputs.question_ids, inputs.question_ids != QUESTION_PADDING
    else:
        token_ids, is_question = inputs.input_ids, inputs.attention_mask.bool() & (inputs.input_ids != image_token_id)
        if inputs.labels is not None:
            is_question &= inputs.labels == IGNORE_INDEX
    words = F.normalize(embed(token_ids.masked_fill(~is_question, 0)).float(), dim=-1) * is_question[..., None]
    questions = words.sum(dim=1) / is_question.sum(dim=1, keepdim=True).clamp(min=1)
    return (F.normalize(features.float(), dim=-1) * questions[sample_of_token(inputs, image_token_id)]).sum(dim=-1)


def sample_of_token(inputs: Sequences, image_token_id: int) -> Tensor:
    """(P,) index of each visual token's sample."""
    return ((inputs.input_ids == image_token_id) & inputs.attention_mask.bool()).nonzero()[:, 0]


class ClipRelevance:
    """Relevance by CLIP, as published for CDPruner: with the text tower and projections of the vision tower's CLIP.

    Not an nn.Module, so that no checkpoint, optimizer or shard of the model contains it. A text that is too long for
    the text tower is split into pieces, each with its own begin and end token. CDPruner's repository instead splits the
    sequence that has one begin and one end token, and leaves open which position of a piece without an end is read.

    Args:
        folder: CLIP checkpoint with its tokenizer.
        vlm: model whose visual tokens are rated.

    Raises:
        ModelError: the model's visual tokens aren't patches of a tower like this CLIP's.
    """

    def __init__(self, folder: str | Path, vlm: PreTrainedModel) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        check_clip_tower(vlm, self.clip.config.vision_config.hidden_size, str(folder))
        # Never run: the VLM's own tower has encoded the images.
        self.clip.vision_model.encoder = nn.Identity()

    @torch.no_grad()
    def __call__(self, question_ids: Tensor, patches: Tensor, sample_of_token: Tensor) -> Tensor:
        """(P,) negative mean cosine similarity between each patch and the pieces of its sample's text.

        Negative as published: in CLIP, patches that are relevant to a text have the lower similarity.

        Args:
            question_ids: (B, Q) tokens by this CLIP's tokenizer, from `tokenize_questions`.
            patches: (P, C) features before the projector; zeros for newline tokens.
            sample_of_token: (P,) index of each patch's text.
        """
        if self.clip.device != patches.device:
            self.clip.to(patches.device)
        states = self.clip.vision_model.post_layernorm(patches.float())
        images = F.normalize(self.clip.visual_projection(states), dim=-1)
        return -(images * self.texts(question_ids)[sample_of_token]).sum(dim=-1)

    def texts(self, question_ids: Tensor) -> Tensor:
        """(B, D) mean of the unit embeddings of each text's pieces."""
        pieces = self.pieces(question_ids)
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        # Attention is causal, so tokens after the first end token have no effect.
        ids = F.pad(F.pad(pieces, (1, 0), value=begin), (0, 1), value=QUESTION_PADDING)
        ids = ids.masked_fill(ids == QUESTION_PADDING, end)
        # An empty text is one piece.
        is_piece = (pieces != QUESTION_PADDING).any(dim=-1)
        is_piece[:, 0] = True
        embeddings = F.normalize(self.clip.get_text_features(ids[is_piece]).pooler_output, dim=-1)
        sums = embeddings.new_zeros(len(ids), embeddings.shape[1])
        sums = sums.index_add(0, is_piece.nonzero()[:, 0], embeddings)
        return sums / is_piece.sum(dim=1, keepdim=True)

    def pieces(self, question_ids: Tensor) -> Tensor:
        """(B, Q) -> (B, pieces, T); T tokens fit between begin and end token."""
        length = self.clip.config.text_config.max_position_embeddings - 2
        num_pieces = max(1, -(-question_ids.shape[1] // length))
        missing = num_pieces * length - question_ids.shape[1]
        return F.pad(question_ids, (0, missing), value=QUESTION_PADDING).unflatten(1, (num_pieces, length))
