"""Edits that make a benchmark's file invalid."""

import json


def edit_line(number, **fields):
    """Change fields of one JSON line; None deletes the field."""

    def edit(text):
        lines = text.splitlines()
        record = json.loads(lines[number - 1]) | fields
        lines[number - 1] = json.dumps({key: value for key, value in record.items() if value is not None})
        return "\n".join(lines) + "\n"

    return edit


def edit_value(*keys, value):
    """Change a nested value of a JSON file; None deletes it."""

    def edit(text):
        content = json.loads(text)
        *path, last = keys
        target = content
        for key in path:
            target = target[key]
        if value is None:
            del target[last]
        else:
            target[last] = value
        return json.dumps(content)

    return edit


def cut(text):
    """Truncate a file."""
    return text[:-20]
