"""What the paper (arXiv 2602.03815) reports itself, with how sure each number is.

Certain: in the paper's abstract. Medium: told second-hand by public digests of the paper, consistent with each other.
Numbers whose row or meaning is unclear are left out: scores of single benchmarks, and the drops of the mismatch table.
"""

from typing import Any, NamedTuple

import pandas as pd


class PaperValue(NamedTuple):
    """A number of the paper and how sure it is: `certain` or `medium`."""

    value: float
    certainty: str

    def __str__(self) -> str:
        return f"{self.value:g} ({self.certainty})"


# Family of the models that config/paper trains. The sources name the family, not the size: 13B has no number.
FAMILIES = {"llava-1.5-7b": "LLaVA-1.5", "llava-next-7b": "LLaVA-NeXT"}
# DualSpeed with the paper's defaults (DivPrune, p 0.9, r 0.1, l 4, alpha 1), per family.
SPEEDUP = {"LLaVA-1.5": PaperValue(2.1, "certain"), "LLaVA-NeXT": PaperValue(4.0, "certain")}
RELATIVE = {"LLaVA-1.5": PaperValue(99.61, "medium"), "LLaVA-NeXT": PaperValue(99.04, "medium")}
DEFAULTS = {
    "method": "dualspeed",
    "pruner": "divprune",
    "pruning_ratio": 0.9,
    "slow_mode_ratio": 0.1,
    "num_virtual_tokens": 4,
    "distillation_weight": 1.0,
}
# Rel. of each line of the ablation on LLaVA-1.5: NaivePrune, then fast and slow modes, isolator, distillation.
ABLATION = tuple(PaperValue(value, "medium") for value in (95.89, 98.88, 99.32, 99.61))

NOTE = (
    "Columns marked (paper) are the paper's own numbers, not ours; certain: in its abstract; medium: second-hand, from "
    "public digests of it. They name LLaVA-1.5 and LLaVA-NeXT without a size and stand beside our 7B models."
)
MISMATCH_NOTE = (
    "The paper's own mismatch table is known only in unclear second-hand words: none of its numbers is shown."
)


def add_paper_values(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` of a summary with the columns rel_paper and speedup_paper (and `_certainty` of each).

    Without these columns where the paper says nothing about any of the rows.
    """
    found = [_values_of(row) for row in rows.to_dict("records")]
    if not any(found):
        return rows
    columns = [f"{name}_paper{end}" for name in ("rel", "speedup") for end in ("", "_certainty")]
    return rows.join(pd.DataFrame(found, index=rows.index, columns=columns))


def _values_of(row: dict[str, Any]) -> dict[str, Any]:
    family = FAMILIES.get(row["model"])
    if family is None or any(row[name] != value for name, value in DEFAULTS.items()):
        return {}
    rel, speedup = RELATIVE[family], SPEEDUP[family]
    return {
        "rel_paper": rel.value,
        "rel_paper_certainty": rel.certainty,
        "speedup_paper": speedup.value,
        "speedup_paper_certainty": speedup.certainty,
    }
