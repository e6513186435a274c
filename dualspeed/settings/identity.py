"""Keys that follow from the settings which decide a result.

A setting at its default is no part of a key, and neither is a field whose metadata says `DECIDES_NOTHING`. So a new
optional setting changes no key and runs nothing again. The price: a changed default changes results under the same
key. Whoever changes one raises `GENERATION`; a test holds the defaults.
"""

import dataclasses
from typing import Any

from dualspeed.files import sha256_of_json

DECIDES_NOTHING = {"decides_result": False}
"""Metadata of a field that changes how a job runs, but not what it makes: `accelerate_config`."""
GENERATION = 1
"""Part of every key; raise it with a change of a default, or of what a setting means."""


def decides(field: dataclasses.Field) -> bool:
    """False for a field that is marked with `DECIDES_NOTHING`."""
    return field.metadata.get("decides_result", True)


def default_of(field: dataclasses.Field) -> Any:
    """Default of a field, `dataclasses.MISSING` for one that must be given."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def record(settings: Any) -> Any:
    """JSON value of a settings dataclass with every field that decides the result, defaults included."""
    return _as_json(settings, with_defaults=True)


def identity(settings: Any) -> Any:
    """JSON value of a settings dataclass without fields at their default; `read_dataclass` reads it back."""
    return _as_json(settings, with_defaults=False)


def key_of(settings: Any, num_digits: int = 8) -> str:
    """Hexadecimal key of a settings dataclass, or of a list of them."""
    return sha256_of_json({"generation": GENERATION, "settings": identity(settings)})[:num_digits]


def _as_json(value: Any, with_defaults: bool) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        shown = [field for field in dataclasses.fields(value) if decides(field)]
        if not with_defaults:
            shown = [field for field in shown if getattr(value, field.name) != default_of(field)]
        return {field.name: _as_json(getattr(value, field.name), with_defaults) for field in shown}
    if isinstance(value, dict):
        return {key: _as_json(item, with_defaults) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item, with_defaults) for item in value]
    return value
