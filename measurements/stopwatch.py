"""Seconds spent in each part of a program, by functions that are wrapped while a context is open."""

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from dualspeed.device import synchronize


class Stopwatch:
    """Sums the seconds of wrapped functions; time in a wrapped function called by another counts only for the inner."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = [0.0]

    def on(self, part: str | Callable[[], str], owner: Any, name: str) -> AbstractContextManager:
        """Context in which `owner.name` is timed as `part`; a callable `part` is asked at each call."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            label = part if isinstance(part, str) else part()
            self._inside.append(0.0)
            synchronize()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize()
            elapsed = time.perf_counter() - start
            self.seconds[label] += elapsed - self._inside.pop()
            self._inside[-1] += elapsed
            return result

        return patch.object(owner, name, timed)
