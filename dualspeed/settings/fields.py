"""Fields of settings dataclasses that know their valid values: checks and JSON schemas follow from them."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from dualspeed.errors import ConfigError
from dualspeed.settings.reading import check_choice


@dataclass(frozen=True)
class Range:
    """Valid numbers of a field; None: no limit on that side."""

    minimum: float | None = None
    """Smallest valid number."""
    above: float | None = None
    """Largest number that is too small."""
    maximum: float | None = None
    """Largest valid number."""
    below: float | None = None
    """Smallest number that is too large."""

    def __contains__(self, value: object) -> bool:
        number = float(value) if isinstance(value, Real) else math.nan
        return (
            math.isfinite(number)
            and (self.minimum is None or number >= self.minimum)
            and (self.above is None or number > self.above)
            and (self.maximum is None or number <= self.maximum)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        if self.maximum is None and self.below is None:
            return f"{self.minimum} or more" if self.above is None else f"above {self.above}"
        left = f"[{self.minimum}" if self.above is None else f"({self.above}"
        return f"in {left}, {self.below})" if self.maximum is None else f"in {left}, {self.maximum}]"


def choice(valid: Iterable[str], **options: Any) -> Any:
    """Field whose text is one of `valid`; options as for `dataclasses.field`."""
    return dataclasses.field(metadata={"choices": tuple(valid)}, **options)


def number(
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    **options: Any,
) -> Any:
    """Field whose number lies in a range; options as for `dataclasses.field`."""
    return dataclasses.field(metadata={"range": Range(minimum, above, maximum, below)}, **options)


def check_fields(settings: Any) -> None:
    """Raise ConfigError at the first field of a dataclass whose value is invalid; a default of None is valid."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is None and field.default is None:
            continue
        if "choices" in field.metadata:
            check_choice(field.name, value, field.metadata["choices"])
        if "range" in field.metadata and value not in field.metadata["range"]:
            valid = f"{field.metadata['range']}{', or null' if field.default is None else ''}"
            raise ConfigError(f"{field.name}: {value!r} is out of range; valid: {valid}")
