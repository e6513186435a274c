"""Seconds by part of a program, without changing the program: functions are wrapped for the time of a context."""

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from dualspeed.training.step_times import synchronize


class Stopwatch:
    """Adds up what the wrapped functions take; one that runs inside another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = [0.0]

    def on(self, part: str | Callable[[], str], owner: Any, name: str) -> AbstractContextManager:
        """Time `owner.name` as `part`, or as what `part()` says when it is called, while the context is open."""
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
