"""DualSpeedModel: a stock Hugging Face VLM that can train on pruned visual tokens.

Input: a batch as the stock model takes it. Output: the loss and its parts. Fast mode encodes the images, prunes their
tokens, puts the mode isolator before the kept ones, and runs the stock forward on the shorter sequence; slow mode runs
it on the full sequence. No subclass or patch of a model family: image features enter through `mm_encoder_outputs`.

B samples, L length, M supervised tokens, V vocabulary.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.generation.utils import GenerateOutput
from transformers.utils import ModelOutput

from dualspeed.batch import IGNORE_INDEX
from dualspeed.method import checkpoint, generation
from dualspeed.method.fast_mode import PruningObserver, encode_batch, prune_batch, pruning_seeds
from dualspeed.method.isolator import ModeIsolator
from dualspeed.method.keywords import KeywordTokenizer
from dualspeed.method.logits import check_supervision
from dualspeed.method.losses import distillation
from dualspeed.method.objective import Objective, at_least_one
from dualspeed.method.outputs import DualSpeedOutput
from dualspeed.method.relevance import ClipRelevance
from dualspeed.method.sequences import Sequences, with_counts
from dualspeed.method.vlm.admission import check_model
from dualspeed.method.vlm.evaluation_mode import evaluation_mode
from dualspeed.method.vlm.families import check_pixel_pruning
from dualspeed.method.vlm.inputs import image_inputs, token_inputs
from dualspeed.method.vlm.parts import conditional_parameters, trainable_visual_parameters
from dualspeed.method.vlm.positions import Positions3D, make_positions
from dualspeed.method.vlm.tower_states import TowerStates
from dualspeed.method.vlm.vision import EncodedImages
from dualspeed.pruners import get_pruner
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.modes import Mode

CHECKPOINTING = (
    "activation" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient"
) + "_checkpointing"
"""Beginning of the names of the switches of a stock model; transformers before 5.23 has the second."""


class DualSpeedModel(nn.Module):
    """VLM with the two modes of DualSpeed (arXiv 2602.03815, section 3).

    Example:
        >>> model = DualSpeedModel(vlm, DualSpeedConfig(pruner="divprune", pruning_ratio=0.9))
        >>> model(**batch, mode=Mode.FAST).loss.backward()
    """

    # The losses are sums over `num_items_in_batch`: every token weighs the same under accumulation and on every rank.
    accepts_loss_kwargs = True

    def __init__(self, vlm: PreTrainedModel, config: DualSpeedConfig) -> None:
        super().__init__()
        if hasattr(vlm, "peft_config"):
            from dualspeed.method import adapters  # needs peft

            vlm = adapters.without_peft(vlm)
        self.vlm = vlm
        self.stored_dtype = vlm.dtype
        """Dtype of the checkpoint; training may hold trainable weights in float32."""
        self.dualspeed = config
        self.pruner = get_pruner(config.pruner)
        self.pruning_observer: PruningObserver | None = None
        """Set by `fast_mode.observe_pruning`."""
        check_model(vlm, config.pruner, self.pruner.needs, config.prune_budget)
        check_pixel_pruning(vlm, config.pixel_pruning)
        clip = config.relevance_clip if self.pruner.reads_text else None
        self.clip_relevance = None if clip is None else ClipRelevance(clip, vlm)
        self.mode_isolator = None
        if config.num_virtual_tokens > 0:
            hidden_size = vlm.config.get_text_config().hidden_size
            self.mode_isolator = ModeIsolator(config.num_virtual_tokens, hidden_size, vlm.dtype).to(vlm.device)
        self._checkpointed_layers = checkpointed_layers(vlm)

    @property
    def config(self) -> PreTrainedConfig:
        """Configuration of the VLM."""
        return self.vlm.config

    @property
    def device(self) -> torch.device:
        """Device of the VLM."""
        return self.vlm.device

    @property
    def loss_type(self) -> str:
        """Tells the trainer to shift labels by one before it counts them."""
        return "ForCausalLM"

    def get_input_embeddings(self) -> nn.Module:
        """Token embeddings of the VLM, where NEFTune adds its noise."""
        return self.vlm.get_input_embeddings()

    @property
    def has_adapters(self) -> bool:
        """True if the VLM is trained by LoRA (dualspeed.method.adapters)."""
        return hasattr(self.vlm, "peft_config")

    @property
    def _no_split_modules(self) -> Collection[str] | None:
        return self.vlm._no_split_modules

    @property
    def is_activation_checkpointing(self) -> bool:
        """True if slow steps recompute activations."""
        return bool(self._checkpointed_layers)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute the language model's activations in the backward pass of slow steps; fast steps keep theirs."""
        # The switch of the whole model would send a gradient through the frozen vision tower as well.
        getattr(self.vlm.get_decoder(), f"{CHECKPOINTING}_enable")(**kwargs)
        self._checkpointed_layers = checkpointed_layers(self.vlm)

    def _recompute(self, recomputes: bool) -> None:
        """Switch the recomputation of activations in the layers that are set to it."""
        for layer in self._checkpointed_layers:
            # torch's hints allow a module's attribute to be a tensor or a module alone.
            layer.gradient_checkpointing = recomputes  # type: ignore[assignment]

    def activation_checkpointing_disable(self) -> None:
        """Keep all activations in slow steps too."""
        getattr(self.vlm.get_decoder(), f"{CHECKPOINTING}_disable")()
        self._checkpointed_layers = []

    # The names that the trainer of transformers before 5.23 calls.
    gradient_checkpointing_enable = activation_checkpointing_enable
    gradient_checkpointing_disable = activation_checkpointing_disable

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        question_ids: Tensor | None = None,
        positions_3d: Tensor | None = None,
        tower_states: TowerStates | None = None,
        mode: Mode = Mode.SLOW,
        distill: bool = True,
        pruning_seed: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        objective: Objective = Objective(),  # noqa: B008  # frozen
        **inputs: Tensor,
    ) -> DualSpeedOutput:
        """Loss of a batch in one mode.

        Args:
            input_ids, attention_mask, labels: (B, L), padded on either side; -100 marks labels without supervision.
            pixel_values, image_sizes: all images of the batch in reading order, as the VLM takes them; None: no image.
            question_ids: (B, Q) tokens of the user's text for query-based pruners; ConversationCollator gives it.
            positions_3d: (B, 3, L) positions for the Qwen-VL families, from a collator with `positions`; else computed.
            tower_states: kept outputs of the frozen tower's layers for all images of the batch; None: the tower runs.
            mode: FAST trains on pruned tokens, SLOW on all of them.
            distill: True lets a slow step learn from fast mode too (unless the distillation weight is 0).
            pruning_seed: changes the random pruners' choice from step to step.
            num_items_in_batch: supervised tokens of the whole step; None: those of this batch.
            objective: how the loss is made of the logits, and which logits are returned.
            inputs: further outputs of the VLM's processor: image_grid_thw, token_type_ids and so on.
        """
        self._recompute((mode := Mode(mode)) is Mode.SLOW)
        labels = torch.full_like(input_ids, IGNORE_INDEX) if labels is None else labels
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pixels = image_inputs(self.vlm, {**inputs, "pixel_values": pixel_values, "image_sizes": image_sizes})
        by_token = token_inputs(self.vlm, input_ids, attention_mask, inputs, pixels, positions_3d)
        full = Sequences(input_ids, attention_mask, labels, by_token, question_ids)
        full, pixels = with_counts(full, self.config.image_token_id, pixels)
        counts, has_images = full.counted(self.config.image_token_id), pixel_values is not None
        grids = counts.grids if mode is Mode.FAST else None
        encoded = encode_batch(self, pixels, grids, tower_states) if has_images or has_other_ranks() else None
        images, teacher_logits = encoded if has_images else None, None
        if distill and mode is Mode.SLOW and self.dualspeed.distillation_weight > 0 and encoded is not None:
            read = encoded if self.dualspeed.pixel_pruning is None else encode_batch(self, pixels, counts.grids)
            teacher = Objective(packs=objective.packs)
            teacher_logits = self._teacher_logits(teacher, full, read if has_images else None, pruning_seed)
        trained, features, isolator = full, images.output if images else None, None
        if mode is Mode.FAST:
            trained, features, isolator = self._fast_inputs(full, images, pruning_seed)
        logits, whole = objective.logits(self.vlm, trained, features)
        check_supervision(sum(counts.supervised), logits, teacher_logits)
        ce_loss = objective.loss(logits, labels, whole, num_items_in_batch)
        loss = ce_loss + self._zero_term(encoded, has_images, mode, isolator)
        distillation_loss = None if mode is Mode.FAST else ce_loss.new_zeros(())
        if teacher_logits is not None and has_images:
            distillation_loss = self._distillation(logits, teacher_logits, num_items_in_batch)
            loss = loss + self.dualspeed.distillation_weight * distillation_loss
        seen = (logits, None) if whole is None else (whole.logits, whole.labels)
        return DualSpeedOutput(loss, ce_loss, distillation_loss, *seen)

    def _distillation(self, logits: Tensor, teacher_logits: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Self-distillation loss of a slow step."""
        num_items = at_least_one(logits, num_items_in_batch)
        return distillation(logits, teacher_logits, self.dualspeed.distillation_temperature, num_items)

    def _teacher_logits(
        self, objective: Objective, full: Sequences, images: EncodedImages | None, pruning_seed: int
    ) -> Tensor:
        """(M, V) logits of the same weights on the fast input, without gradient or dropout.

        Args:
            images: what fast steps read: without the squares of pixels that are pruned before the tower.
        """
        with torch.no_grad(), evaluation_mode(self.vlm):
            return objective.logits(self.vlm, *self._fast_inputs(full, images, pruning_seed)[:2])[0]

    def _fast_inputs(
        self, full: Sequences, images: EncodedImages | None, pruning_seed: int
    ) -> tuple[Sequences, ModelOutput | None, Tensor | None]:
        """Sequences and image features of fast mode; for a batch without images, also the isolator's output.

        ZeRO-3 gathers weights and reduces gradients in the order of the calls, which has to be the same on all ranks:
        a batch without images makes those of `prune_batch` too.
        """
        if images:
            return *prune_batch(self, full, images, pruning_seeds(self, images, pruning_seed)), None
        if self.pruner.reads_text and self.clip_relevance is None:
            with torch.no_grad():
                self.vlm.get_input_embeddings()(full.input_ids[:1])
        return full, None, None if self.mode_isolator is None else self.mode_isolator()

    def _zero_term(
        self, encoded: EncodedImages | None, has_images: bool, mode: Mode, isolator: Tensor | None
    ) -> Tensor | float:
        """Zero term that keeps unused visual parameters in the graph (DDP, FSDP).

        Data parallelism needs every parameter in the graph of every step, and the same modules called on every rank.
        """
        unused: list[Tensor] = [*conditional_parameters(self.vlm)]
        if self.mode_isolator is not None and not (has_images and mode is Mode.FAST):
            unused.append(self.mode_isolator() if isolator is None else isolator)
        if not has_images:
            unused += encoded.all_features() if encoded is not None else trainable_visual_parameters(self.vlm)
        return 0.0 * sum(values.sum() for values in unused)

    def question_tokenizer(self, processor: ProcessorMixin) -> PreTrainedTokenizerBase | KeywordTokenizer | None:
        """Tokenizer for `question_ids`; None if unused."""
        if not self.pruner.reads_text:
            return None
        tokenizer = processor.tokenizer if self.clip_relevance is None else self.clip_relevance.tokenizer
        return KeywordTokenizer(tokenizer) if "text_similarity" in self.pruner.needs else tokenizer

    def positions(self) -> Positions3D | None:
        """Function for ConversationCollator that computes 3-D positions on the host; None for families without."""
        return make_positions(self.vlm)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        question_ids: Tensor | None = None,
        mode: Mode = Mode.SLOW,
        **kwargs: Any,
    ) -> Tensor | GenerateOutput:
        """Generate on all tokens (SLOW: the stock model) or on pruned ones behind the isolator (FAST).

        Args:
            input_ids, attention_mask, pixel_values, image_sizes, question_ids: as for `forward`.
            kwargs: further inputs of the VLM, and the arguments of stock generation. In either mode they mean what they
                mean there: `max_length` counts the whole prompt, which processors, criteria and streamers see.

        Returns:
            (B, L + new) the given input_ids followed by the new tokens, in either mode; with
            `return_dict_in_generate=True` the stock output, with such sequences.

        Raises:
            ConfigError: FAST, with an argument that reads the prompt by itself (`assistant_model`).
        """
        return generation.generate(
            self, input_ids, attention_mask, pixel_values, image_sizes, question_ids, mode, **kwargs
        )

    def save_pretrained(
        self,
        folder: str | Path,
        state_dict: dict[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        merged: bool = True,
    ) -> None:
        """Write the stock checkpoint with the isolator and the method's settings beside it.

        Args:
            state_dict: full state dict of this model, needed if its parameters are sharded.
            dtype: dtype of the weights in the files; None: as they are.
            merged: False writes only the adapters of a model that has them, not the large merged checkpoint.
        """
        checkpoint.save_checkpoint(self, folder, state_dict, dtype, merged)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, config: DualSpeedConfig | None = None, **kwargs: Any
    ) -> "DualSpeedModel":
        """Load checkpoint and isolator.

        Args:
            config: settings of the method; None: those that the checkpoint was saved with, or the defaults.
            kwargs: for the VLM's from_pretrained.
        """
        saved = checkpoint.read_method_settings(folder)
        config = config or saved or DualSpeedConfig()
        if saved is not None:
            checkpoint.check_isolator(folder, saved)
        model = cls(checkpoint.load_vlm(folder, **kwargs), config)
        model.load_isolator(folder)
        return model

    def load_isolator(self, folder: str | Path) -> bool:
        """Load the isolator of a checkpoint; False, and the present one stays, if the checkpoint has none.

        Raises:
            ModelError: the saved isolator has another shape than `num_virtual_tokens` asks for.
        """
        return checkpoint.load_isolator(self.mode_isolator, folder)


def has_other_ranks() -> bool:
    """True if other processes train along (DDP, FSDP), so that all ranks must call the same modules."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def checkpointed_layers(vlm: PreTrainedModel) -> list[nn.Module]:
    """Modules of the language model that are set to recompute their activations."""
    return [module for module in vlm.get_decoder().modules() if getattr(module, "gradient_checkpointing", False)]
