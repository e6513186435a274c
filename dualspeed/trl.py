"""`DualSpeedSFTTrainer`, which takes the place of TRL's SFTTrainer; it needs `pip install dualspeed[trl]`."""

from importlib.util import find_spec
from typing import Any

from dualspeed.errors import MissingPackageError

__all__ = ["DualSpeedSFTTrainer"]  # noqa: F822  # made at its first use


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    if find_spec("trl") is None:
        raise MissingPackageError(f"{name} needs trl, which is not installed; valid: pip install 'dualspeed[trl]'")
    from dualspeed.training.sft import DualSpeedSFTTrainer

    return DualSpeedSFTTrainer


def __dir__() -> list[str]:
    return __all__
