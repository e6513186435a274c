"""YAML files, with errors that name file, line and column; a key that is there twice is one of them."""

from pathlib import Path
from typing import Any

import yaml

from dualspeed.errors import ConfigError
from dualspeed.settings.reading import is_text


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but a repeated key is an error, and so is a value that is none of its type."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise _Error(f"the key {key.value!r} is there twice", key)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, AttributeError, TypeError, OverflowError, KeyError) as error:  # a date of month 13, say
            raise _Error(f"{node.value!r:.80} is no {node.tag.rpartition(':')[2]}: {error}", node) from None
        if isinstance(value, str) and not is_text(value):
            raise _Error("a character that no name and no path can hold", node)
        return value


class _Error(yaml.MarkedYAMLError):
    def __init__(self, problem: str, node: yaml.Node) -> None:
        super().__init__(problem=problem, problem_mark=node.start_mark)


def read_yaml(path: Path) -> Any:
    """Content of a YAML file; ConfigError names the file, and line and column where it is no YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; valid: a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    try:
        return yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = before.count("\n") + 1, len(before) - before.rfind("\n")
        problem = f"the character {text[error.position]!r} is not allowed"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        problem = " ".join(str(error.problem or error.context).split())
    except RecursionError:
        place, problem = (1, 1), "nested too deeply"
    raise ConfigError(f"{path}, line {place[0]}: not valid YAML at column {place[1]} ({problem})")
