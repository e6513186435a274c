"""DualSpeed: train multimodal LLMs on pruned visual tokens most of the time, and use them on all of them.

The public names are resolved when they are first used, so that `import dualspeed.settings` loads no torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULE_OF_NAME = {
    "DualSpeedConfig": "dualspeed.settings.method",
    "DualSpeedModel": "dualspeed.method.model",
    "DualSpeedTrainer": "dualspeed.training.trainer",
    "Mode": "dualspeed.settings.modes",
    "ModeIsolator": "dualspeed.method.isolator",
}

__all__ = sorted(_MODULE_OF_NAME)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module 'dualspeed' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_MODULE_OF_NAME[name]), name)


def __dir__() -> list[str]:
    return __all__
