"""Tables of methods in the docs: made from the records. UPDATE_README=1 writes them."""

import os
import re

import pytest

from dualspeed.method.vlm.families import CAPTURED_FIELDS
from dualspeed.pruners import PRUNERS, Pruner
from tests.support.paths import REPOSITORY

READS = {
    "before_merger": "features before Qwen-VL's merger",
    "cls_attention": "attention",
    "keys": "keys",
    "pre_projection": "features before the projector",
    "relevance": "the user's text",
    "seeds": "a seed",
    "text_similarity": "the user's text",
}


def reads_tower(pruner: Pruner) -> bool:
    return bool(set(pruner.needs) & set(CAPTURED_FIELDS))


def line_of(name: str, pruner: Pruner) -> str:
    """Row of README's table."""
    paper = f" ([{pruner.paper}](https://arxiv.org/abs/{pruner.paper}))" if pruner.paper else ""
    reads = ", ".join(READS[field] for field in (*pruner.needs, *pruner.optional)) or "-"
    models = "with a readable tower" if reads_tower(pruner) else "all"
    return f"| `{name}`{paper} | {pruner.keeps} | {reads} | {models} |"


def table_of_methods() -> str:
    lines = ["| `pruner` | keeps | reads, beside the projected features | models |", "|---|---|---|---|"]
    return "\n".join(lines + [line_of(name, pruner) for name, pruner in PRUNERS.items()])


def feature_based() -> str:
    *names, last = (f"`{name}`" for name, pruner in PRUNERS.items() if not reads_tower(pruner))
    return f"`feature-based` are {', '.join(names)} and {last}."


@pytest.mark.parametrize(
    ("page", "mark", "made"),
    [("README.md", "methods", table_of_methods), ("docs/families.md", "feature-based", feature_based)],
)
def test_docs_list_the_methods(page, mark, made):
    path = REPOSITORY / page
    around = rf"(?<=<!-- {mark}:start -->\n)(.*?)(?=\n<!-- {mark}:end -->)"
    before, old, after = re.split(around, path.read_text(), flags=re.DOTALL)
    if os.environ.get("UPDATE_README"):
        path.write_text(before + made() + after)
    assert old == made()


def test_every_method_says_what_it_keeps():
    assert all(pruner.keeps for pruner in PRUNERS.values())
    assert [name for name, pruner in PRUNERS.items() if not pruner.paper] == ["random", "uniform"]
