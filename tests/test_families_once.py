"""One place for what a family of VLMs is: outside of it, no code asks a model for its family."""

import ast
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from dualspeed.method.vlm.families import FAMILIES
from dualspeed.settings.families import BASE_FAMILIES
from tests.support.paths import REPOSITORY

PACKAGE = REPOSITORY / "dualspeed"
KNOWS_FAMILIES = ("method/vlm/", "settings/families.py", "base_models/")
NAMES = {*FAMILIES, *BASE_FAMILIES, *(family.processor for family in BASE_FAMILIES.values()), "model_type"}
CLASS_PREFIXES = tuple(CONFIG_MAPPING_NAMES[name].removesuffix("Config") for name in FAMILIES)


def questions(source: str) -> list[str]:
    """Places in a module that ask for a family, as "line: what": its name, `model_type`, or a check of a class."""
    found = []
    tree = ast.parse(source)
    subscripts = {id(node.slice) for node in ast.walk(tree) if isinstance(node, ast.Subscript)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in NAMES:
            found.append(f"{node.lineno}: {node.value!r}")
        elif isinstance(node, ast.Attribute) and node.attr == "model_type":
            found.append(f"{node.lineno}: .model_type")
        elif id(node) not in subscripts:
            found += [f"{node.lineno}: {name}" for child in classes_compared(node) for name in family_classes(child)]
    return found


def classes_compared(node: ast.AST) -> list[ast.expr]:
    """Operands of `isinstance`, `issubclass`, comparisons and class patterns, and what a table of classes holds."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
        return node.args[1:]
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, ast.MatchClass):
        return [node.cls]
    if isinstance(node, ast.Dict):
        return [key for key in node.keys if key is not None]
    return list(node.elts) if isinstance(node, ast.Tuple | ast.List | ast.Set) else []


def family_classes(node: ast.expr) -> list[str]:
    """Names of a family's classes in an operand; tables are looked at by themselves, called constructors not at all."""
    if isinstance(node, ast.BinOp):
        return family_classes(node.left) + family_classes(node.right)
    name = getattr(node, "id", None) or getattr(node, "attr", "")
    return [name] if name.startswith(CLASS_PREFIXES) else []


def modules() -> list[Path]:
    """Modules of the package that mustn't know families."""
    return [
        path for path in sorted(PACKAGE.rglob("*.py")) if not str(path.relative_to(PACKAGE)).startswith(KNOWS_FAMILIES)
    ]


def test_only_the_records_and_base_models_know_families():
    found = [f"{path.relative_to(REPOSITORY)}:{place}" for path in modules() for place in questions(path.read_text())]
    assert found == []


def test_the_exempt_places_exist():
    for place in KNOWS_FAMILIES:
        assert (PACKAGE / place).exists()


@pytest.mark.parametrize(
    "line",
    [
        'if family == "llava_next": pass',
        'x = {"qwen2_vl": 1}',
        "x = vlm.config.model_type",
        'x = getattr(vlm.config, "model_type")',
        "isinstance(vlm, LlavaForConditionalGeneration)",
        "isinstance(vlm, (PreTrainedModel, transformers.Qwen2_5_VLForConditionalGeneration))",
        "isinstance(vlm, PreTrainedModel | Idefics3Model)",
        "if type(processor) is LlavaNextProcessor: pass",
        'x = {LlavaProcessor: "pad"}.get(type(processor))',
        "TABLE = (CLIPImageProcessorPil, LlavaImageProcessorPil)",
        "match vlm:\n    case PaliGemmaModel(): pass",
        'if type(processor).__name__ == "LlavaProcessor": pass',
    ],
)
def test_a_planted_question_is_found(line):
    assert questions(line)


@pytest.mark.parametrize(
    "line",
    [
        "model = LlavaForConditionalGeneration(config)",
        "def f(model: LlavaForConditionalGeneration) -> dict[str, LlavaProcessor]: ...",
        '"""Questions as LLaVA puts them."""',
        'path = folder / "llava_mme.jsonl"',
        "isinstance(model, DualSpeedModel)",
    ],
)
def test_using_a_class_or_naming_a_file_is_no_question(line):
    assert not questions(line)
