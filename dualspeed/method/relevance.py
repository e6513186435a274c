"""How near each visual token is to what the user asks: what CDPruner goes by.

The question enters as `question_ids` (B, Q), tokens of the user's turns alone, in the vocabulary of whoever judges:
the language model or, by the setting `relevance_clip`, CLIP. P visual tokens in the batch, D width of the language
model, C width of the vision tower.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel, PreTrainedModel

from dualspeed.batch import IGNORE_INDEX, QUESTION_PADDING
from dualspeed.errors import ModelError
from dualspeed.method.sequences import Sequences


@torch.no_grad()
def relevance_by_llm(inputs: Sequences, features: Tensor, embed: nn.Module, image_token_id: int) -> Tensor:
    """(P,) mean cosine similarity of each token to the question's, in the language model's own embedding space.

    Without `question_ids` the question is all that is attended to, is no image and isn't supervised: of a prompt, the
    system's part as well.

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
    """(P,) index of the sample that each visual token stands in."""
    return ((inputs.input_ids == image_token_id) & inputs.attention_mask.bool()).nonzero()[:, 0]


class ClipRelevance:
    """Relevance as CDPruner has it: by the text tower and the projections of the CLIP that the vision tower is from.

    Not a module, so that no checkpoint, optimizer or shard of the model holds it. A text longer than the text tower
    takes is cut into pieces, each between its own beginning and end; the repository cuts what stands between one
    beginning and one end, and tells nothing about where a piece without an end is read.

    Args:
        folder: a CLIP checkpoint with its tokenizer.
        vlm: the model whose tokens are judged.

    Raises:
        ValueError: the model's tokens aren't patches of a tower like this CLIP's.
    """

    def __init__(self, folder: str | Path, vlm: PreTrainedModel) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        check_clip(self.clip, vlm, folder)
        # The model's own tower has run already.
        self.clip.vision_model.encoder = nn.Identity()

    @torch.no_grad()
    def __call__(self, question_ids: Tensor, patches: Tensor, sample_of_token: Tensor) -> Tensor:
        """(P,) negative mean cosine similarity between each patch and the pieces of its sample's text.

        Negative as published: patches that matter to a text have the lower similarity there.

        Args:
            question_ids: (B, Q), as from `tokenize_questions` with this CLIP's tokenizer.
            patches: (P, C) features before the projector; newlines, which have none, count as a patch of zeros.
            sample_of_token: (P,) which of the B texts a patch belongs to.
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
        # What follows the first end is never looked at: attention is causal.
        ids = F.pad(F.pad(pieces, (1, 0), value=begin), (0, 1), value=QUESTION_PADDING)
        ids = ids.masked_fill(ids == QUESTION_PADDING, end)
        # A text without a word is one piece.
        is_piece = (pieces != QUESTION_PADDING).any(dim=-1)
        is_piece[:, 0] = True
        embeddings = F.normalize(self.clip.get_text_features(ids[is_piece]).pooler_output, dim=-1)
        sums = embeddings.new_zeros(len(ids), embeddings.shape[1])
        sums = sums.index_add(0, is_piece.nonzero()[:, 0], embeddings)
        return sums / is_piece.sum(dim=1, keepdim=True)

    def pieces(self, question_ids: Tensor) -> Tensor:
        """(B, Q) -> (B, pieces, T), as many tokens as fit between beginning and end."""
        length = self.clip.config.text_config.max_position_embeddings - 2
        num_pieces = max(1, -(-question_ids.shape[1] // length))
        missing = num_pieces * length - question_ids.shape[1]
        return F.pad(question_ids, (0, missing), value=QUESTION_PADDING).unflatten(1, (num_pieces, length))


def check_clip(clip: CLIPModel, vlm: PreTrainedModel, folder: str | Path) -> None:
    """Raise ModelError unless CLIP's projection takes what the model's projector takes: patches of a tower like it."""
    family, vision = vlm.config.model_type, vlm.config.vision_config
    width = clip.config.vision_config.hidden_size
    if family not in ("llava", "llava_next") or vision.model_type != "clip_vision_model" or vision.hidden_size != width:
        raise ModelError(
            f"relevance_clip: {folder} projects patches of a CLIP tower of width {width}, which those of "
            f"{type(vlm).__name__} with a {vision.model_type} of width {vision.hidden_size} are not; without "
            "relevance_clip the language model's own embeddings serve any model"
        )
