"""Processor of a stage: a checkpoint's processor with the stage's chat template and `image_aspect_ratio`.

Both are saved with the stage's checkpoint, so that inference treats images and prompts as the last training did.
"""

from pathlib import Path

from transformers import AutoProcessor, LlavaImageProcessorPil, ProcessorMixin

from dualspeed.chat_templates import AUTO, use_template
from dualspeed.errors import ConfigError
from dualspeed.settings.families import aspect_ratios_of


def load_processor(folder: str | Path, chat_template: str, image_aspect_ratio: str | None = None) -> ProcessorMixin:
    """Load the processor in `folder` with these settings.

    Args:
        folder: a checkpoint.
        chat_template: one of TEMPLATE_NAMES, or AUTO for the processor's own.
        image_aspect_ratio: `square`, `pad` or `anyres` (dualspeed.settings.recipe); None: the processor's own.

    Raises:
        ConfigError: unknown chat template, or `image_aspect_ratio` of another family.
    """
    processor = AutoProcessor.from_pretrained(folder)
    if chat_template != AUTO:
        use_template(processor, chat_template)
    if image_aspect_ratio is not None:
        use_image_aspect_ratio(processor, image_aspect_ratio)
    return processor


def use_image_aspect_ratio(processor: ProcessorMixin, name: str) -> None:
    """Set how a LLaVA processor fits images to the tower, by LLaVA's names; ConfigError for another family's name."""
    valid = aspect_ratios_of(type(processor).__name__)
    if name not in valid:
        raise ConfigError(
            f"image_aspect_ratio {name!r} is not for a {type(processor).__name__}; "
            f"valid: {' or '.join(valid) or 'null, which leaves images to the processor'}"
        )
    if name != "anyres":
        # The Hub's checkpoints name CLIP's own image processor, which ignores do_pad and always crops.
        settings = processor.image_processor.to_dict() | {"do_pad": name == "pad"}
        processor.image_processor = LlavaImageProcessorPil.from_dict(settings)
