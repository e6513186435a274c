"""Types of the command line's arguments: what argparse calls with an argument's text."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path


def settings_file(text: str) -> Path:
    """Path of a file of settings; the JSON text that stood here before is refused."""
    if text.lstrip().startswith("{"):
        raise argparse.ArgumentTypeError("JSON text; valid: the path of a file that holds it")
    return Path(text)


def json_argument(names: tuple[str, ...]) -> Callable[[str], dict[str, str]]:
    """Parser of a JSON object of text values with exactly these keys."""

    def parse(text: str) -> dict[str, str]:
        try:
            value = json.loads(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"not valid JSON ({error})") from None
        if not isinstance(value, dict) or set(value) != set(names):
            raise argparse.ArgumentTypeError(f"{text}; valid: a JSON object of {' and '.join(names)}")
        return value

    return parse


STORE = json_argument(("uri", "experiment"))
PARENT = json_argument(("row", "settings_hash"))


def read_shard(text: str) -> tuple[int, int]:
    """(1, 2) of 1/2."""
    number, _, total = text.partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise argparse.ArgumentTypeError(f"{text!r}; valid: K/N with K from 1 to N, 1/2 say")
    return int(number), int(total)
