"""Chat templates: the prompt format of a conversation, and the part of it that is supervised.

Those that a processor can be given are Jinja files in this folder, in the form that Hugging Face processors save with a
checkpoint. Text in their `{% generation %}` blocks is supervised. `twins` has those of templates that models ship.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from dualspeed.chat_templates.twins import twin_of
from dualspeed.errors import ConfigError

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_FOLDER = Path(__file__).parent

TEMPLATE_NAMES = tuple(sorted(path.stem for path in _FOLDER.glob("*.jinja")))
AUTO = "auto"
"""In a recipe, in place of a name: the template that the model itself has."""


def load_template(name: str) -> str:
    """Jinja source of the template `name`; ConfigError lists the valid names."""
    if name not in TEMPLATE_NAMES:
        raise ConfigError(f"chat template {name!r} is unknown; valid: {', '.join(TEMPLATE_NAMES)}")
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def use_template(processor: "ProcessorMixin", name: str) -> None:
    """Set the chat template of a processor to the one named `name`; `save_pretrained` then writes it."""
    processor.chat_template = load_template(name)


def template_in_use(name: str, checkpoint: Path) -> str:
    """All text that decides what a recipe's conversations look like and what of them is supervised.

    Args:
        name: one of TEMPLATE_NAMES, or AUTO: the twin of the checkpoint's own template, or else that itself.
        checkpoint: folder with the processor.
    """
    if name != AUTO:
        return load_template(name)
    own = _saved_template(checkpoint)
    twin = twin_of(own)
    return own if twin is None else json.dumps([twin.source, twin.settings])


def _saved_template(checkpoint: Path) -> str:
    """Chat template that a processor saved; empty if it saved none."""
    if (file := checkpoint / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        file = checkpoint / name
        found = json.loads(file.read_text(encoding="utf-8")).get("chat_template") if file.is_file() else None
        if found:
            return found if isinstance(found, str) else json.dumps(found)
    return ""
