"""Chat templates: the prompt format of a conversation, and the part of it that is supervised.

Each is one Jinja file in this folder, in the form that Hugging Face processors save with a checkpoint. Text in its
`{% generation %}` blocks is supervised.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from dualspeed.errors import ConfigError

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_FOLDER = Path(__file__).parent

TEMPLATE_NAMES = tuple(sorted(path.stem for path in _FOLDER.glob("*.jinja")))


def load_template(name: str) -> str:
    """Jinja source of the template `name`; ConfigError lists the valid names."""
    if name not in TEMPLATE_NAMES:
        raise ConfigError(f"chat template {name!r} is unknown; valid: {', '.join(TEMPLATE_NAMES)}")
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def use_template(processor: "ProcessorMixin", name: str) -> None:
    """Set the chat template of a processor to the one named `name`; `save_pretrained` then writes it."""
    processor.chat_template = load_template(name)
