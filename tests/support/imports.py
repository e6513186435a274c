"""Arrows between the rooms of the package: which folder or root module imports which, read from the syntax trees."""

import ast
from pathlib import Path

PACKAGE = "dualspeed"


def arrows(root: Path) -> dict[tuple[str, str], list[str]]:
    """(room, imported room) -> places, "file:line", of the package that lies at `root`/dualspeed.

    Imports at every depth count: in functions, under TYPE_CHECKING, and `import_module` of a literal name. A room is a
    folder right below the package, with all that it holds, or a module beside them. `cli` and the package's
    `__init__`, which reach everything lazily, are left out.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        if parts in (("cli",), ("__init__",)):
            continue
        for module, line in imported_modules(path, root):
            room = module.split(".")[1]
            if room != parts[0]:
                found.setdefault((parts[0], room), []).append(f"{path.relative_to(root)}:{line}")
    return found


def imported_modules(path: Path, root: Path) -> list[tuple[str, int]]:
    """Modules of the package that a file imports, absolute names, with the line of each import."""
    package = ".".join(path.relative_to(root).parent.parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = modules_of_from(node, package)
        elif isinstance(node, ast.Call) and is_import_module(node):
            names = [literal_start(node.args[0])]
        else:
            continue
        found += [(name, node.lineno) for name in names if name.startswith(f"{PACKAGE}.")]
    return found


def modules_of_from(node: ast.ImportFrom, package: str) -> list[str]:
    """`from a import b` names a.b, which is a module or a name in one; relative imports are resolved."""
    base = node.module or ""
    if node.level:
        above = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*above, base] if base else above)
    return [f"{base}.{alias.name}" for alias in node.names]


def is_import_module(call: ast.Call) -> bool:
    """True for `import_module(...)` and `importlib.import_module(...)` with an argument."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name == "import_module" and bool(call.args)


def literal_start(argument: ast.expr) -> str:
    """The text that a module's name begins with, as far as it is literal: `f"dualspeed.pruners.{name}"`."""
    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
        return argument.value
    if isinstance(argument, ast.JoinedStr) and isinstance(argument.values[0], ast.Constant):
        return str(argument.values[0].value)
    return ""


def rooms(root: Path) -> list[str]:
    """Names of the rooms of the package that lies at `root`/dualspeed."""
    entries = (root / PACKAGE).iterdir()
    return sorted(
        entry.stem for entry in entries if entry.suffix == ".py" or (entry.is_dir() and any(entry.rglob("*.py")))
    )


def longest_path(edges: set[tuple[str, str]]) -> list[str]:
    """Rooms of the longest import path, the importing one first; ValueError names a cycle."""
    below: dict[str, list[str]] = {}
    targets: dict[str, set[str]] = {}
    for source, target in edges:
        targets.setdefault(source, set()).add(target)

    def longest(room: str, above: tuple[str, ...]) -> list[str]:
        if room in above:
            raise ValueError(" -> ".join([*above[above.index(room) :], room]))
        if room not in below:
            paths = [longest(target, (*above, room)) for target in sorted(targets.get(room, ()))]
            below[room] = [room, *max(paths, key=len, default=[])]
        return below[room]

    return max((longest(room, ()) for room in sorted(targets)), key=len, default=[])
