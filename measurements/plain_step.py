"""Training steps like the published implementation's: the reference that our steps are measured and tested against.

Images are encoded twice, for teacher and student. The pruner takes one image at a time. Every position has logits and
a float32 copy of them. Activations are always recomputed, and attention always gets a padding mask. Each function
accumulates the gradients of one global batch. B samples, L length, M supervised tokens, V vocabulary; -100 marks labels
without supervision.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from dualspeed.pruners import num_tokens_to_keep
from measurements import published

IGNORE_INDEX = -100


def baseline(vlm: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """Cross-entropy on all tokens."""
    recompute_always(vlm)
    cross_entropy(full_logits(vlm, batch), batch["labels"]).backward()


def fast(vlm: PreTrainedModel, isolator: nn.Module, batch: dict[str, Tensor], pruning_ratio: float) -> None:
    """Cross-entropy on kept tokens behind the isolator."""
    recompute_always(vlm)
    fast_loss(vlm, isolator, batch, pruning_ratio).backward()


def slow(vlm: PreTrainedModel, isolator: nn.Module, batch: dict[str, Tensor], pruning_ratio: float) -> None:
    """Cross-entropy on all tokens, and distillation from the pruned ones."""
    recompute_always(vlm)
    slow_loss(vlm, isolator, batch, pruning_ratio).backward()


def fast_loss(vlm: PreTrainedModel, isolator: nn.Module, batch: dict[str, Tensor], pruning_ratio: float) -> Tensor:
    """Loss of `fast`."""
    return cross_entropy(*pruned_logits(vlm, isolator, batch, pruning_ratio))


def slow_loss(vlm: PreTrainedModel, isolator: nn.Module, batch: dict[str, Tensor], pruning_ratio: float) -> Tensor:
    """Loss of `slow`."""
    with torch.no_grad():
        teacher_logits, teacher_labels = pruned_logits(vlm, isolator, batch, pruning_ratio)
    logits, labels = full_logits(vlm, batch), batch["labels"]
    student, teacher = supervised(logits, labels), supervised(teacher_logits, teacher_labels)
    divergence = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)
    return cross_entropy(logits, labels) + divergence / len(student)


def recompute_always(vlm: PreTrainedModel) -> None:
    """Switch activation checkpointing of the language model on; the tower has no gradient."""
    vlm.get_decoder().activation_checkpointing_enable()


def full_logits(vlm: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """(B, L, V) float32 logits on all tokens."""
    return vlm(**{name: values for name, values in batch.items() if name != "labels"}, use_cache=False).logits.float()


def pruned_logits(
    vlm: PreTrainedModel, isolator: nn.Module, batch: dict[str, Tensor], pruning_ratio: float
) -> tuple[Tensor, Tensor]:
    """(B, L', V) float32 logits of the pruned sequences, one image a sample, and their labels."""
    inputs = {name: batch[name] for name in ("pixel_values", "image_sizes") if name in batch}
    images = vlm.get_image_features(**inputs, return_dict=True).pooler_output
    embeddings, labels = [], []
    for row, features in enumerate(images):
        kept = published.divprune(features.detach().float(), num_tokens_to_keep(len(features), pruning_ratio))
        visual = torch.cat([isolator().to(features.dtype), features[kept]])
        is_token = batch["attention_mask"][row].bool()
        ids, targets = batch["input_ids"][row][is_token], batch["labels"][row][is_token]
        places = (ids == vlm.config.image_token_id).nonzero()[:, 0]
        start, end = int(places[0]), int(places[-1]) + 1
        embed = vlm.get_input_embeddings()
        embeddings.append(torch.cat([embed(ids[:start]), visual, embed(ids[end:])]))
        ignored = targets.new_full((len(visual),), IGNORE_INDEX)
        labels.append(torch.cat([targets[:start], ignored, targets[end:]]))
    padded = nn.utils.rnn.pad_sequence(embeddings, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in labels], batch_first=True)
    logits = vlm(inputs_embeds=padded, attention_mask=mask, use_cache=False).logits.float()
    return logits, nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the supervised tokens of (B, L, V) logits, computed at every position."""
    shifted = logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(shifted, labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


def supervised(logits: Tensor, labels: Tensor) -> Tensor:
    """(M, V) logits that predict supervised tokens."""
    return logits[:, :-1][labels[:, 1:] != IGNORE_INDEX]
