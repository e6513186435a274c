"""DualSpeed: train multimodal LLMs on pruned visual tokens in most steps, and use them on full tokens.

Public names are resolved at their first use, so that `import dualspeed` and `import dualspeed.settings` load no torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULE_OF_NAME = {
    "ConversationCollator": "dualspeed.data.collator",
    "DualSpeedConfig": "dualspeed.settings.method",
    "DualSpeedModel": "dualspeed.method.model",
    "DualSpeedTrainer": "dualspeed.training.trainer",
    "LoraRecipe": "dualspeed.settings.recipe",
    "Mode": "dualspeed.settings.modes",
    "ModeIsolator": "dualspeed.method.isolator",
    "Problem": "dualspeed.data.conversations",
    "add_adapters": "dualspeed.method.adapters",
    "read_entries": "dualspeed.data.annotations",
    "read_record": "dualspeed.data.conversations",
    "use_template": "dualspeed.chat_templates",
}

__all__ = sorted(_MODULE_OF_NAME)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module 'dualspeed' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_MODULE_OF_NAME[name]), name)


def __dir__() -> list[str]:
    return __all__
