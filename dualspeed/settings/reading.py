"""Type-driven reading: nested mappings (YAML, JSON) become dataclasses, or one `ConfigError` that says where and what.

A key is unknown, missing or of another type than its dataclass field: the message names file, dotted key, value and
what would be valid. PyYAML reads `2e-5` as a string and `yes` as a bool; neither passes for a number here.
"""

import dataclasses
import difflib
import math
import re
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from dualspeed.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
LONGEST_NAME = 100
"""Characters of a name; names of folders and files are made of several."""
_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 200


def check_choice(key: str, value: str, valid: Iterable[str]) -> None:
    """Raise ConfigError unless `value` is one of `valid`."""
    valid = sorted(valid)
    if value not in valid:
        raise ConfigError(f"{key}: {quote(value)} is unknown{did_you_mean(value, valid)}; valid: {', '.join(valid)}")


def check_range(key: str, value: float, is_valid: bool, valid: str) -> None:
    """Raise ConfigError unless `is_valid` and finite; `valid` says what would be."""
    if not (is_valid and math.isfinite(value)):
        raise ConfigError(f"{key}: {value!r} is out of range; valid: {valid}")


def check_name(key: str, name: str, taken: Iterable[str] = ()) -> None:
    """Raise ConfigError unless `name` can name a folder and a wildcard, and is not one of `taken`."""
    if name in taken:
        raise ConfigError(f"{key}: {name!r} is taken; valid: any other name")
    if not NAME.fullmatch(str(name)):
        raise ConfigError(f"{key}: {quote(name)} cannot name a folder; valid: letters, digits, '.', '_' and '-'")
    if len(str(name)) > LONGEST_NAME:
        raise ConfigError(f"{key}: {quote(name)} has {len(name)} characters; valid: at most {LONGEST_NAME}")


def quote(value: object) -> str:
    """Value as messages show it, cut where it is long."""
    try:
        return _short.repr(value)
    except ValueError:  # of an int with more digits than Python converts
        return f"<{type(value).__name__}>"


def did_you_mean(word: object, valid: Iterable[str]) -> str:
    """` (did you mean 'x'?)` if something in `valid` comes close to `word`, else nothing."""
    matches = difflib.get_close_matches(str(word)[:LONGEST_NAME], list(valid), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def read_dataclass(cls: type, data: Any, file: str, key: str = "", **derived: Any) -> Any:
    """The `cls` that `data` describes; `key` is the dotted path of `data` in `file`, `derived` fields are not read.

    Raises:
        ConfigError: an unknown, missing or mistyped key, or a check of the dataclass's own that fails.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{file}: {key or 'top level'}: {_describe(data)}; valid: a mapping of keys")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name not in derived}
    prefix = f"{key}." if key else ""
    for name in data:
        if name not in fields:
            known = ", ".join(fields)
            raise ConfigError(f"{file}: {prefix}{_key(name)}: unknown key{did_you_mean(name, fields)}; valid: {known}")
    for name, field in fields.items():
        if name not in data and field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{file}: {prefix}{name}: missing; valid: {_name_of(hints[name])}")
    values = {name: read_value(hints[name], value, file, f"{prefix}{name}") for name, value in data.items()}
    try:
        return cls(**values, **derived)
    except ConfigError as error:
        raise ConfigError(f"{file}: {prefix}{error}") from None
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from None


def read_value(hint: Any, value: Any, file: str, key: str) -> Any:
    """`value` as the type `hint` asks for: scalars, unions, lists, tuples, dicts and dataclasses."""
    if hint is Any:
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return read_dataclass(hint, value, file, key)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in arguments:
            return None
        hint, *others = [argument for argument in arguments if argument is not types.NoneType]
        if not others:
            return read_value(hint, value, file, key)
        hint = (hint, *others)
    elif origin is dict and isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ConfigError(f"{file}: {key}: key {_describe(name)}; valid: str, in quotes if it looks otherwise")
        return {name: read_value(arguments[1], item, file, f"{key}.{name}") for name, item in value.items()}
    elif origin in (list, tuple) and isinstance(value, list | tuple):
        items = [read_value(arguments[0], item, file, f"{key}[{index}]") for index, item in enumerate(value)]
        return origin(items)
    elif origin is not None:
        hint = origin
    if not is_instance(value, hint):
        raise ConfigError(f"{file}: {key}: {_describe(value)}; valid: {_name_of(hint)}{exponent_hint(value)}")
    if isinstance(value, str) and not is_text(value):
        raise ConfigError(f"{file}: {key}: {quote(value)} holds a character that no name and no path can; valid: text")
    return float(value) if hint is float else value


def is_text(value: str) -> bool:
    """False for a text with a zero byte or half a character, which no file's name and no UTF-8 file can hold."""
    return not any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value)


def is_instance(value: object, hint: Any) -> bool:
    """isinstance, but a bool is no number, and an int passes for a float."""
    hints = hint if isinstance(hint, tuple) else (hint,)
    if isinstance(value, bool):
        return bool in hints
    return isinstance(value, tuple(hints) + ((int,) if float in hints else ()))


def exponent_hint(value: object) -> str:
    """Advice for a number such as `2e-5`, which YAML reads as a string; empty for other values."""
    try:
        mantissa, exponent = str(float(value)).split("e") if isinstance(value, str) else ("", "")
    except ValueError:
        return ""
    mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
    return f" (YAML reads {value} as a string; write {mantissa}e{exponent})" if exponent else ""


def _key(name: object) -> str:
    return name if isinstance(name, str) and len(name) <= LONGEST_NAME else quote(name)


def _describe(value: object) -> str:
    return f"{quote(value)} is {'empty' if value is None else f'of type {type(value).__name__}'}"


def _name_of(hint: Any) -> str:
    if isinstance(hint, tuple):
        return " or ".join(item.__name__ for item in hint)
    return hint.__name__ if isinstance(hint, type) and typing.get_origin(hint) is None else str(hint)
