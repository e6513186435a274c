"""A checkpoint's processor as a stage uses it: its chat template, and how it makes pictures square.

Both are saved with the stage's checkpoint, so that inference sees pictures and prompts as training last did.
"""

from pathlib import Path

from transformers import AutoProcessor, LlavaImageProcessorPil, LlavaNextProcessor, LlavaProcessor, ProcessorMixin

from dualspeed.chat_templates import use_template
from dualspeed.errors import ConfigError


def load_processor(folder: str | Path, chat_template: str, image_aspect_ratio: str | None = None) -> ProcessorMixin:
    """The processor in `folder`; ConfigError if it can't handle pictures so.

    Args:
        image_aspect_ratio: `square`, `pad` or `anyres` (dualspeed.settings.recipe); None: as the folder has it.
    """
    processor = AutoProcessor.from_pretrained(folder)
    use_template(processor, chat_template)
    if image_aspect_ratio is not None:
        use_image_aspect_ratio(processor, image_aspect_ratio)
    return processor


def use_image_aspect_ratio(processor: ProcessorMixin, name: str) -> None:
    """Make a LLaVA processor handle pictures as LLaVA's setting of this name does; ConfigError for another family's."""
    valid = {LlavaProcessor: ("pad", "square"), LlavaNextProcessor: ("anyres",)}.get(type(processor), ())
    if name not in valid:
        raise ConfigError(
            f"image_aspect_ratio {name!r} is not for a {type(processor).__name__}; "
            f"valid: {' or '.join(valid) or 'null, which leaves pictures to the processor'}"
        )
    if name != "anyres":
        # CLIP's own processor, which the Hub's checkpoints name, crops whatever it is told about padding.
        settings = processor.image_processor.to_dict() | {"do_pad": name == "pad"}
        processor.image_processor = LlavaImageProcessorPil.from_dict(settings)
