"""Rows of Arrow tables as Python values: images as they are stored, {bytes, path}, and JSON columns parsed.

`datasets` holds columns of mixed types, as messages whose content is text here and a list there, as JSON text.
"""

import json
from typing import TYPE_CHECKING, Any

# Imported inside the function that uses it: it comes with the workflow.
if TYPE_CHECKING:
    import pyarrow


def rows_of(table: "pyarrow.Table | pyarrow.RecordBatch") -> list[dict[str, Any]]:
    """Return the rows of a table; ValueError for values that Python can't hold, and for broken JSON."""
    rows = table.to_pylist()
    types = {field.name: field.type for field in table.schema if has_json(field.type)}
    return [row | {name: parsed(row[name], kind) for name, kind in types.items()} for row in rows] if types else rows


def has_json(kind: "pyarrow.DataType") -> bool:
    """True for an Arrow type with JSON text in it."""
    import pyarrow

    if isinstance(kind, pyarrow.JsonType):
        return True
    return any(has_json(kind.field(place).type) for place in range(kind.num_fields))


def parsed(value: Any, kind: "pyarrow.DataType") -> Any:
    """Return a value of an Arrow type with its JSON text parsed."""
    import pyarrow

    if value is None or not has_json(kind):
        return value
    if isinstance(kind, pyarrow.JsonType):
        return json.loads(value)
    if isinstance(value, dict):
        return {name: parsed(value[name], kind.field(name).type) for name in value}
    return [parsed(item, kind.field(0).type) for item in value]
