"""Similarity of each visual token to the user's text: to each of its tokens (MMTok), or on average (CDPruner).

The text enters as `question_ids` (B, Q): the tokens of the user's turns (for MMTok, of their keywords), in the
vocabulary of the model that computes the similarity. That is the language model or, with the setting `relevance_clip`,
CLIP. P visual tokens in the batch, T text tokens of the longest text, D width of the language model, C width of the
vision tower.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel, PreTrainedModel

from dualspeed.batch import IGNORE_INDEX, QUESTION_PADDING
from dualspeed.method.host_counts import to_device
from dualspeed.method.sequences import Sequences
from dualspeed.method.vlm.families import check_clip_tower


@torch.no_grad()
def similarity_by_llm(inputs: Sequences, features: Tensor, embed: nn.Module, image_token_id: int) -> Tensor:
    """(P, T) cosine of each visual token to each of its question's tokens, among the language model's embeddings.

    -inf beyond a question's tokens. Without `question_ids` the question is every token that is attended to, no image
    and unsupervised, so that it includes the system prompt.

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
    words = F.normalize(embed(token_ids.masked_fill(~is_question, 0)).float(), dim=-1)
    # Products of all tokens with all samples' words would need no counts, but B times the work.
    parts = F.normalize(features.float(), dim=-1).split(inputs.counted(image_token_id).placeholders)
    rows = [
        (part @ of_sample.T).masked_fill(~is_word, -torch.inf)
        for part, of_sample, is_word in zip(parts, words, is_question, strict=True)
    ]
    return torch.cat(rows)


def mean_similarity(similarity: Tensor) -> Tensor:
    """(P, T) similarities, -inf for none -> (P,) their means; 0 where there are none."""
    is_text = similarity > -torch.inf
    return similarity.masked_fill(~is_text, 0.0).sum(dim=-1) / is_text.sum(dim=-1).clamp(min=1)


def sample_of_token(inputs: Sequences, image_token_id: int) -> Tensor:
    """(P,) index of each visual token's sample."""
    placeholders = torch.tensor(inputs.counted(image_token_id).placeholders)
    return to_device(torch.arange(len(placeholders)).repeat_interleave(placeholders), inputs.input_ids)


class ClipRelevance:
    """Similarity by CLIP, as published for CDPruner: with the text tower and projections of the vision tower's CLIP.

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
    def __call__(
        self, question_ids: Tensor, patches: Tensor, sample_of_token: Tensor, num_words: list[int] | None = None
    ) -> Tensor:
        """(P, T) negative cosine similarity between each patch and each piece of its sample's text, -inf for none.

        Negative as published: in CLIP, patches that are relevant to a text have the lower similarity.

        Args:
            question_ids: (B, Q) tokens by this CLIP's tokenizer, from `tokenize_questions`.
            patches: (P, C) features before the projector; zeros for newline tokens.
            sample_of_token: (P,) index of each patch's text.
            num_words: (B,) tokens of each text; None: counted, with a host-device sync.
        """
        if self.clip.device != patches.device:
            self.clip.to(patches.device)
        states = self.clip.vision_model.post_layernorm(patches.float())
        images = F.normalize(self.clip.visual_projection(states), dim=-1)
        num_words = num_words or (question_ids != QUESTION_PADDING).sum(dim=1).tolist()
        texts, is_piece = self.texts(question_ids, num_words)
        similarity = torch.einsum("pd,ptd->pt", images, texts[sample_of_token])
        return (-similarity).masked_fill(~is_piece[sample_of_token], -torch.inf)

    def texts(self, question_ids: Tensor, num_words: list[int]) -> tuple[Tensor, Tensor]:
        """Unit embeddings (B, T, D) of each text's pieces, and (B, T) bool, True for pieces; an empty text is one.

        Args:
            num_words: (B,) tokens of each text.
        """
        pieces = self.pieces(question_ids)
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        # Attention is causal, so tokens after the first end token have no effect.
        ids = F.pad(F.pad(pieces, (1, 0), value=begin), (0, 1), value=QUESTION_PADDING)
        ids = ids.masked_fill(ids == QUESTION_PADDING, end)
        batch_size, num_pieces, length = pieces.shape
        # On the host, where the number of pieces of each text is known.
        is_piece = torch.arange(num_pieces) * length < torch.tensor(num_words).clamp(min=1)[:, None]
        places = to_device(is_piece.flatten().nonzero()[:, 0], ids)
        embeddings = F.normalize(self.clip.get_text_features(ids.flatten(0, 1)[places]).pooler_output, dim=-1)
        texts = embeddings.new_zeros(batch_size * num_pieces, embeddings.shape[1]).index_copy(0, places, embeddings)
        return texts.unflatten(0, (batch_size, num_pieces)), is_piece.to(ids.device, non_blocking=True)

    def pieces(self, question_ids: Tensor) -> Tensor:
        """(B, Q) -> (B, pieces, T); T tokens fit between begin and end token."""
        length = self.clip.config.text_config.max_position_embeddings - 2
        num_pieces = max(1, -(-question_ids.shape[1] // length))
        missing = num_pieces * length - question_ids.shape[1]
        return F.pad(question_ids, (0, missing), value=QUESTION_PADDING).unflatten(1, (num_pieces, length))
