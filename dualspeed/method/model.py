"""DualSpeedModel: a stock Hugging Face VLM that can train on pruned visual tokens.

Enters: a batch as the stock model takes it. Leaves: the loss and its parts. In fast mode images are encoded, pruned,
and put back behind the mode isolator into a shorter sequence, which the stock forward then runs; in slow mode it runs
the whole sequence. No subclass of a model family, no patch: features enter through `mm_encoder_outputs`.

B samples, L length, U units of pruning (an image, or one of its tiles), K tokens kept, P visual tokens of the batch,
M supervised tokens, D width of the language model, l length of the isolator, V vocabulary.
"""

import inspect
import json
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import ModelOutput

from dualspeed.batch import IGNORE_INDEX
from dualspeed.errors import ModelError
from dualspeed.files import write_json
from dualspeed.method.isolator import ISOLATOR_FILE, ModeIsolator
from dualspeed.method.losses import cross_entropy, distillation, supervised_labels, supervised_positions
from dualspeed.method.relevance import ClipRelevance, relevance_by_llm, sample_of_token
from dualspeed.method.sequences import Sequences, mask_for_attention, prune_inputs
from dualspeed.method.vlm.families import (
    TOKEN_INPUTS,
    blank_image,
    check_family,
    image_inputs,
    image_seeds,
    token_inputs,
)
from dualspeed.method.vlm.vision import EncodedImages, encode_images, pruning_units, trainable_visual_parameters
from dualspeed.pruners import MergedTokens, VisualTokens, get_pruner, num_tokens_to_keep
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.modes import Mode

logger = logging.getLogger(__name__)

CONFIG_FILE = "dualspeed.json"


def load_vlm(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a stock checkpoint; raises if any of its weights is missing, unexpected or of another shape."""
    vlm, report = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True, **kwargs)
    wrong = {what: sorted(map(str, keys)) for what, keys in report.items() if keys}
    if wrong:
        raise ModelError(f"{path}: the weights don't fit {type(vlm).__name__}: {wrong}")
    return vlm


@dataclass
class DualSpeedOutput(ModelOutput):
    """Losses of one batch. `distillation_loss` is None in fast mode, 0.0 in slow mode where no teacher ran."""

    # All but the distillation's are always there; ModelOutput wants defaults.
    loss: Tensor = None  # type: ignore[assignment]
    ce_loss: Tensor = None  # type: ignore[assignment]
    distillation_loss: Tensor | None = None
    logits: Tensor = None  # type: ignore[assignment]
    """(M, V) logits that predict the supervised tokens, sample after sample."""


class DualSpeedModel(nn.Module):
    """A VLM with the two modes of DualSpeed (arXiv 2602.03815, section 3)."""

    # The losses are sums over `num_items_in_batch`, so that accumulation and ranks weigh every token alike.
    accepts_loss_kwargs = True

    def __init__(self, vlm: PreTrainedModel, config: DualSpeedConfig) -> None:
        super().__init__()
        self.vlm = vlm
        self.stored_dtype = vlm.dtype
        """Of the checkpoint; training may hold what it trains in float32."""
        self.dualspeed = config
        self.pruner = get_pruner(config.pruner)
        check_family(vlm, config.pruner, self.pruner.needs, config.prune_budget)
        clip = config.relevance_clip if "relevance" in self.pruner.needs else None
        self.clip_relevance = None if clip is None else ClipRelevance(clip, vlm)
        self.mode_isolator = None
        if config.num_virtual_tokens > 0:
            hidden_size = vlm.config.get_text_config().hidden_size
            self.mode_isolator = ModeIsolator(config.num_virtual_tokens, hidden_size, vlm.dtype).to(vlm.device)
        self._recomputed = recomputing_layers(vlm)

    @property
    def config(self) -> PreTrainedConfig:
        """The VLM's own configuration."""
        return self.vlm.config

    @property
    def device(self) -> torch.device:
        """Where the VLM lies."""
        return self.vlm.device

    @property
    def loss_type(self) -> str:
        """Tells the trainer that labels are shifted by one before they are counted."""
        return "ForCausalLM"

    @property
    def has_adapters(self) -> bool:
        """Whether the VLM is trained by LoRA (dualspeed.method.adapters)."""
        return hasattr(self.vlm, "peft_config")

    @property
    def _no_split_modules(self) -> Collection[str] | None:
        return self.vlm._no_split_modules

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether slow steps recompute activations."""
        return bool(self._recomputed)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute the language model's activations in the backward pass of slow steps; fast ones keep their few."""
        # The whole model's switch would have a gradient flow through the frozen vision tower as well.
        self.vlm.get_decoder().activation_checkpointing_enable(**kwargs)
        self._recomputed = recomputing_layers(self.vlm)

    def activation_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        self.vlm.get_decoder().activation_checkpointing_disable()
        self._recomputed = []

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        question_ids: Tensor | None = None,
        mode: Mode = Mode.SLOW,
        distill: bool = True,
        pruning_seed: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Tensor,
    ) -> DualSpeedOutput:
        """Loss of a batch in one mode.

        Args:
            input_ids, attention_mask, labels: (B, L), padded on either side; -100 marks labels without supervision.
            pixel_values, image_sizes: all images of the batch in reading order, as the VLM takes them; None: no image.
            question_ids: (B, Q) what the user asks, which cdpruner goes by; ConversationCollator gives it.
            mode: FAST trains on pruned tokens, SLOW on all of them.
            distill: whether a slow step also learns from the fast mode (if the distillation weight isn't 0).
            pruning_seed: moves random pruners from step to step.
            num_items_in_batch: supervised tokens of the whole step; None: those of this batch.
            inputs: what else the VLM's processor returns: image_grid_thw, token_type_ids and so on.
        """
        mode = Mode(mode)
        for layer in self._recomputed:
            layer.gradient_checkpointing = mode is Mode.SLOW  # type: ignore[assignment]  # to torch's hints, a tensor
        labels = torch.full_like(input_ids, IGNORE_INDEX) if labels is None else labels
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pixels = image_inputs(self.vlm, {**inputs, "pixel_values": pixel_values, "image_sizes": image_sizes})
        full = Sequences(input_ids, attention_mask, labels, question_ids=question_ids)
        full = full._replace(by_token=token_inputs(self.vlm, full, inputs, pixels))
        has_images = pixel_values is not None
        distill = distill and mode is Mode.SLOW and self.dualspeed.distillation_weight > 0
        images = self._encode(pixels) if has_images or is_sharded() else None
        shown = images if has_images else None
        seeds = self._seeds(pixels, pruning_seed)

        teacher_logits = None
        if distill and images is not None:
            with torch.no_grad(), evaluation_mode(self.vlm):
                teacher_logits = self._logits(*(self._pruned(full, shown, seeds) if shown else (full, None)))
        if shown and mode is Mode.FAST:
            logits = self._logits(*self._pruned(full, shown, seeds))
        else:
            logits = self._logits(full, shown.output if shown else None)

        # At least 1: a step without any supervised token has a loss of 0.
        num_items = torch.as_tensor(len(logits) if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        targets = supervised_labels(labels)
        ce_loss = cross_entropy(logits, targets, num_items)
        loss = ce_loss + self._zero_for_idle_parameters(images, has_images, mode)
        distillation_loss = None if mode is Mode.FAST else ce_loss.new_zeros(())
        if teacher_logits is not None and has_images:
            temperature = self.dualspeed.distillation_temperature
            distillation_loss = distillation(logits, teacher_logits, temperature, num_items)
            loss = loss + self.dualspeed.distillation_weight * distillation_loss
        return DualSpeedOutput(loss=loss, ce_loss=ce_loss, distillation_loss=distillation_loss, logits=logits)

    def _encode(self, images: dict[str, Tensor]) -> EncodedImages:
        """Encode the batch's images, or a blank one where it has none but other ranks may."""
        return encode_images(
            self.vlm,
            images or blank_image(self.vlm),
            needs=self.pruner.needs if self.clip_relevance is None else ("pre_projection",),
            with_tiles=self.dualspeed.prune_budget == "tile",
        )

    def _seeds(self, images: dict[str, Tensor], pruning_seed: int) -> Tensor | None:
        """(units,) seeds where the pruner draws; reading every pixel for others would be a waste."""
        if "pixel_values" not in images or "seeds" not in self.pruner.needs:
            return None
        return image_seeds(self.vlm, images, pruning_seed)

    def _logits(self, inputs: Sequences, images: ModelOutput | None) -> Tensor:
        """(M, V) logits at the positions that predict a supervised token; others are never computed."""
        return self.vlm(
            input_ids=inputs.input_ids,
            attention_mask=mask_for_attention(inputs),
            mm_encoder_outputs={} if images is None else {"image": images},
            logits_to_keep=supervised_positions(inputs.labels),  # type: ignore[arg-type]  # None in generation alone
            use_cache=False,
            **inputs.by_token,
        ).logits

    def _pruned(
        self, inputs: Sequences, images: EncodedImages, seeds: Tensor | None, padding_side: str = "right"
    ) -> tuple[Sequences, ModelOutput]:
        """The batch as fast mode sees it: compacted inputs and, for each unit, isolator and kept features."""
        features = torch.cat(images.features)
        units, unit_seeds = pruning_units(images, seeds)
        num_keep = torch.tensor([num_tokens_to_keep(len(unit), self.dualspeed.pruning_ratio) for unit in units])
        described = images.described
        if "relevance" in self.pruner.needs:
            described = described | {"relevance": self._relevance(inputs, features, described)}
        kept, kept_features = self._keep(features, units, num_keep, described, unit_seeds)

        num_copies = torch.zeros(len(features), dtype=torch.long, device=features.device)
        num_copies[torch.cat(kept)] = 1
        num_copies[torch.stack([unit[0] for unit in kept])] += self.dualspeed.num_virtual_tokens
        isolator = [] if self.mode_isolator is None else [self.mode_isolator().to(features.dtype)]
        unit_features = [torch.cat([*isolator, vectors]) for vectors in kept_features]
        compacted = prune_inputs(inputs, self.config.image_token_id, num_copies, padding_side)
        return compacted, images.keeping(unit_features, kept, self.dualspeed.num_virtual_tokens)

    def _relevance(self, inputs: Sequences, features: Tensor, described: dict[str, Tensor]) -> Tensor:
        """(P,) how near each visual token is to what its sample's user asks."""
        if self.clip_relevance is None:
            embed = self.vlm.get_input_embeddings()
            return relevance_by_llm(inputs, features, embed, self.config.image_token_id)
        if inputs.question_ids is None:
            raise ModelError(
                "relevance_clip needs question_ids: give ConversationCollator or generation_inputs "
                "question_tokenizer=model.question_tokenizer(processor)"
            )
        samples = sample_of_token(inputs, self.config.image_token_id)
        return self.clip_relevance(inputs.question_ids, described["pre_projection"], samples)

    def question_tokenizer(self, processor: ProcessorMixin) -> PreTrainedTokenizerBase | None:
        """What turns the user's text into `question_ids`; None for pruners that don't go by it."""
        if "relevance" not in self.pruner.needs:
            return None
        return processor.tokenizer if self.clip_relevance is None else self.clip_relevance.tokenizer

    def _keep(
        self,
        features: Tensor,
        units: list[Tensor],
        num_keep: Tensor,
        described: dict[str, Tensor],
        seeds: Tensor | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What the pruner keeps of each unit: positions in (P, D) features, ascending, and the vectors there."""
        positions = pad_sequence(units, batch_first=True)
        tokens = VisualTokens(
            features=features[positions],
            mask=pad_sequence([torch.ones_like(unit, dtype=torch.bool) for unit in units], batch_first=True),
            seeds=seeds,
            **{name: values[positions] for name, values in described.items()},
        )
        chosen = self.pruner(tokens, num_keep)
        indices = chosen.indices if isinstance(chosen, MergedTokens) else chosen
        counts = num_keep.tolist()
        kept = [unit[row[:k]] for unit, row, k in zip(units, indices, counts, strict=True)]
        if isinstance(chosen, MergedTokens):
            return kept, [row[:k] for row, k in zip(chosen.features, counts, strict=True)]
        return kept, [features[unit] for unit in kept]

    def _zero_for_idle_parameters(self, images: EncodedImages | None, has_images: bool, mode: Mode) -> Tensor | float:
        """0, with a gradient of 0 for the visual parameters that this step's loss doesn't reach.

        So that data parallelism never meets an unused parameter, and that no rank calls a module which others don't.
        """
        idle = []
        if self.mode_isolator is not None and not (has_images and mode is Mode.FAST):
            idle.append(self.mode_isolator())
        if not has_images:
            idle += images.all_features() if images is not None else trainable_visual_parameters(self.vlm)
        return 0.0 * sum(values.sum() for values in idle)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        question_ids: Tensor | None = None,
        mode: Mode = Mode.SLOW,
        **kwargs: Any,
    ) -> Tensor:
        """Generate on all tokens (SLOW: the stock model) or on pruned ones behind the isolator (FAST).

        Args:
            kwargs: further inputs of the VLM, and settings of generation.

        Returns:
            (B, L + new) the input_ids as given, followed by the new tokens, in either mode.
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        images = {"pixel_values": pixel_values, "image_sizes": image_sizes}
        images = {name: values for name, values in images.items() if values is not None}
        if mode is Mode.SLOW or not images:
            return self.vlm.generate(input_ids=input_ids, attention_mask=attention_mask, **images, **kwargs)
        takes = inspect.signature(self.vlm.get_image_features).parameters
        inputs = {name: kwargs.pop(name) for name in list(kwargs) if name in takes or name in TOKEN_INPUTS}
        pixels = image_inputs(self.vlm, inputs | images)
        whole = Sequences(input_ids, attention_mask, None, question_ids=question_ids)
        whole = whole._replace(by_token=token_inputs(self.vlm, whole, inputs, pixels))
        pruned, kept = self._pruned(whole, self._encode(pixels), self._seeds(pixels, 0), padding_side="left")
        # Given positions (3-D ones, as in the Qwen-VL families), stock generation counts on from the last of them.
        output = self.vlm.generate(
            input_ids=pruned.input_ids,
            attention_mask=pruned.attention_mask,
            mm_encoder_outputs={"image": kept},
            **pruned.by_token,
            **kwargs,
        )
        return torch.cat([input_ids, output[:, pruned.input_ids.shape[1] :]], dim=1)

    def save_pretrained(
        self,
        folder: str | Path,
        state_dict: dict[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        merged: bool = True,
    ) -> None:
        """Write the stock checkpoint, and beside it the isolator and the settings, which other software ignores.

        Args:
            state_dict: this model's whole state where its own is sharded.
            dtype: of the weights in the files; None: as they are.
            merged: False leaves a model with adapters at those, without the large stock checkpoint they are merged to.
        """
        state_dict = self.state_dict() if state_dict is None else state_dict
        if dtype is not None:
            state_dict = {key: value.to(dtype) for key, value in state_dict.items()}
        prefix = "vlm."
        weights = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if self.has_adapters:
            from dualspeed.method import adapters  # needs peft

            adapters.save_adapters(self.vlm, weights, Path(folder) / adapters.ADAPTER_FOLDER)
            if merged:
                adapters.save_merged(self.vlm, weights, folder)
        else:
            self.vlm.save_pretrained(folder, state_dict=weights)
        if self.mode_isolator is not None:
            isolator = state_dict["mode_isolator.weight"].detach().contiguous().cpu()
            save_file({"mode_isolator.weight": isolator}, Path(folder) / ISOLATOR_FILE, metadata={"format": "pt"})
        if dtype is not None:
            # transformers has noted the type that training holds weights in.
            self.vlm.config.dtype = dtype
            self.vlm.config.save_pretrained(folder)
        write_json(Path(folder) / CONFIG_FILE, self.dualspeed.to_dict())

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, config: DualSpeedConfig | None = None, **kwargs: Any
    ) -> "DualSpeedModel":
        """Load checkpoint and isolator.

        Args:
            config: the method's settings; None: those the folder was saved with, or the defaults.
            kwargs: for the VLM's own from_pretrained.
        """
        folder = Path(folder)
        if config is None:
            saved = folder / CONFIG_FILE
            config = DualSpeedConfig(**json.loads(saved.read_text())) if saved.exists() else DualSpeedConfig()
        model = cls(load_vlm(folder, **kwargs), config)
        model.load_isolator(folder)
        return model

    def load_isolator(self, folder: str | Path) -> bool:
        """Take the isolator from a checkpoint folder; False where there is none and the present one stays.

        Raises:
            ValueError: the saved isolator has another shape than `num_virtual_tokens` asks for.
        """
        file = Path(folder) / ISOLATOR_FILE
        if self.mode_isolator is None or not file.exists():
            return False
        saved = load_file(file)["mode_isolator.weight"]
        if saved.shape != self.mode_isolator.weight.shape:
            raise ModelError(
                f"{file}: isolator of shape {tuple(saved.shape)}, but num_virtual_tokens and the model's width ask for "
                f"{tuple(self.mode_isolator.weight.shape)}"
            )
        with torch.no_grad():
            self.mode_isolator.weight.copy_(saved)
        return True


def is_sharded() -> bool:
    """Whether other processes train along, so that all of them must call the same modules."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def recomputing_layers(vlm: PreTrainedModel) -> list[nn.Module]:
    """Those parts of the language model that are set to recompute their activations."""
    return [module for module in vlm.get_decoder().modules() if getattr(module, "gradient_checkpointing", False)]


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the context and give every module its own mode back."""
    training = [submodule for submodule in module.modules() if submodule.training]
    module.eval()
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True
