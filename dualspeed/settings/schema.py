"""JSON schemas of a configuration and of a sheet's rows, generated from the dataclasses that read them.

`python -m dualspeed.settings.schema` writes them to workflow/schemas, where editors and Snakemake read them; a test
holds the files to what this module generates.
"""

import ast
import dataclasses
import inspect
import sys
import textwrap
import types
import typing
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from dualspeed.files import write_atomic
from dualspeed.settings.fields import Range
from dualspeed.settings.method import DualSpeedConfig
from dualspeed.settings.names import BENCHMARK_NAMES, SERVER_FILES, TABLES
from dualspeed.settings.project import Project
from dualspeed.settings.sheet_file import COLUMNS, METHODS, REQUIRED

DIALECT = "https://json-schema.org/draft/2020-12/schema"
NAME = "^[A-Za-z0-9][A-Za-z0-9._-]*$"
SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean", types.NoneType: "null"}
DERIVED = ("rows", "sheet_name")
"""Fields of a Project that the sheet gives, not the configuration."""


def config_schema() -> dict[str, Any]:
    """Schema of config.yaml."""
    definitions: dict[str, Any] = {}
    schema = class_schema(Project, definitions)
    for name in DERIVED:
        del schema["properties"][name]
    schema["required"] = [name for name in schema["required"] if name not in DERIVED] + ["experiments"]
    properties = schema["properties"]
    properties["experiments"] = {"type": "string", "description": "Path of the sheet of experiments."}
    definitions["SceneSettings"]["properties"]["source"] = {"const": "demo"}
    properties["benchmarks"] |= {"minProperties": 1, "propertyNames": {"enum": [*BENCHMARK_NAMES, *SERVER_FILES]}}
    properties["models"] |= {"minProperties": 1}
    return {"$schema": DIALECT, "title": "Configuration of a project"} | schema | {"$defs": definitions}


def row_schema() -> dict[str, Any]:
    """Schema of the non-empty cells of a row."""
    fields = {field.name: field for field in dataclasses.fields(DualSpeedConfig)}
    properties = {
        name: {"type": SCALARS[kind]} | (field_schema(fields[name]) if name in fields else {})
        for name, kind in COLUMNS.items()
    }
    properties["id"]["pattern"] = NAME
    properties["method"] = {"enum": list(METHODS)}
    properties["seed"]["minimum"] = 0
    properties["tables"]["pattern"] = f"^ *({'|'.join(TABLES)})( *, *({'|'.join(TABLES)}))* *$"
    return {
        "$schema": DIALECT,
        "title": "Row of the sheet of experiments",
        "type": "object",
        "additionalProperties": False,
        "required": list(REQUIRED),
        "properties": properties,
    }


def class_schema(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    """Schema of a mapping that becomes the dataclass `cls`; the classes of its fields go to `definitions`."""
    hints, descriptions = typing.get_type_hints(cls), field_docstrings(cls)
    properties, required = {}, []
    for field in dataclasses.fields(cls):
        properties[field.name] = type_schema(hints[field.name], definitions) | field_schema(field)
        if field.name in descriptions:
            properties[field.name]["description"] = descriptions[field.name]
        if field.default is field.default_factory is dataclasses.MISSING:
            required.append(field.name)
    schema = {"type": "object", "additionalProperties": False, "properties": properties}
    return schema | ({"required": required} if required else {})


def type_schema(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Schema of a type hint: scalars, unions with None, tuples, dicts and dataclasses, which go to `definitions`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in SCALARS:
        return {"type": SCALARS[hint]}
    if dataclasses.is_dataclass(hint):
        cls = typing.cast(type, hint)
        if cls.__name__ not in definitions:
            definitions[cls.__name__] = class_schema(cls, definitions)
        return {"$ref": f"#/$defs/{cls.__name__}"}
    if origin in (types.UnionType, typing.Union):
        (kind,) = [argument for argument in arguments if argument is not types.NoneType]
        schema = type_schema(kind, definitions)
        if "type" in schema:
            return schema | {"type": [schema["type"], "null"]}
        return {"anyOf": [schema, {"type": "null"}]}
    if origin is tuple:
        schema = {"type": "array", "items": type_schema(arguments[0], definitions)}
        return schema if arguments[-1] is ... else schema | {"minItems": len(arguments), "maxItems": len(arguments)}
    if origin is dict and arguments[1] is not Any:
        return {"type": "object", "additionalProperties": type_schema(arguments[1], definitions)}
    return {"type": "object"}


def field_schema(field: dataclasses.Field) -> dict[str, Any]:
    """Limits that a field's metadata states."""
    if "choices" in field.metadata:
        return {"enum": [*field.metadata["choices"], *([None] if field.default is None else [])]}
    limits: Range = field.metadata.get("range", Range())
    named = {
        "minimum": limits.minimum,
        "exclusiveMinimum": limits.above,
        "maximum": limits.maximum,
        "exclusiveMaximum": limits.below,
    }
    return {name: value for name, value in named.items() if value is not None}


@cache
def field_docstrings(cls: type) -> dict[str, str]:
    """Docstrings below the fields of a dataclass and of its bases, by the fields' names."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]  # a ClassDef
        for statement, after in pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
                found[statement.target.id] = inspect.cleandoc(after.value.value)  # type: ignore[union-attr, attr-defined]
    return found


def schema_files() -> dict[str, str]:
    """{name of a file in workflow/schemas: its text}."""
    head = "# Generated by `python -m dualspeed.settings.schema`.\n"
    schemas = {"config.schema.yaml": config_schema(), "experiments.schema.yaml": row_schema()}
    return {
        name: head + yaml.safe_dump(schema, sort_keys=False, width=120, allow_unicode=True)
        for name, schema in schemas.items()
    }


def main() -> None:
    """Write the schemas to the folder that is named, workflow/schemas by default."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "workflow/schemas")
    for name, text in schema_files().items():
        write_atomic(folder / name, text)


if __name__ == "__main__":
    main()
