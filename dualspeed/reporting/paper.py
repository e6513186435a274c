"""Numbers that the paper (arXiv 2602.03815) reports, with the certainty of each.

Certain: in the paper's abstract. Medium: second-hand, from public digests of the paper that agree with each other.
Numbers whose row or meaning is unclear are left out: scores of single benchmarks, and the drops of the mismatch table.
"""

from typing import Any, NamedTuple

import pandas as pd

from dualspeed.reporting.summary import DEFAULTS, SETTINGS


class PaperValue(NamedTuple):
    """Number of the paper with its certainty, `certain` or `medium`."""

    value: float
    certainty: str


# Family of each model that config/paper trains. The sources name the family, not the size: 13B has no number.
FAMILIES = {"llava-1.5-7b": "LLaVA-1.5", "llava-next-7b": "LLaVA-NeXT"}
# DualSpeed with the paper's settings (the defaults of DualSpeedConfig), for each family.
SPEEDUP = {"LLaVA-1.5": PaperValue(2.1, "certain"), "LLaVA-NeXT": PaperValue(4.0, "certain")}
RELATIVE = {"LLaVA-1.5": PaperValue(99.61, "medium"), "LLaVA-NeXT": PaperValue(99.04, "medium")}
# Rel. of each line of the ablation on LLaVA-1.5: NaivePrune, then fast and slow modes, isolator, distillation.
ABLATION = tuple(PaperValue(value, "medium") for value in (95.89, 98.88, 99.32, 99.61))

NOTE = (
    "Columns marked (paper) are the paper's own numbers, not ours; certain: in its abstract; medium: second-hand, from "
    "public digests of it. They name LLaVA-1.5 and LLaVA-NeXT without a size and stand beside our 7B models."
)
MISMATCH_NOTE = (
    "The paper's own mismatch table is known only in unclear second-hand words: none of its numbers is shown."
)


def add_paper_values(summary: pd.DataFrame) -> pd.DataFrame:
    """Add the columns rel_paper and speedup_paper, and `_certainty` of each, to a summary.

    The summary itself if the paper has a number for none of its lines.
    """
    values = [_values_of(line) for line in summary.to_dict("records")]
    if not any(values):
        return summary
    columns = [f"{name}_paper{end}" for name in ("rel", "speedup") for end in ("", "_certainty")]
    return summary.join(pd.DataFrame(values, index=summary.index, columns=columns))


def add_ablation_values(lines: pd.DataFrame) -> pd.DataFrame:
    """Add the columns rel_paper and rel_paper_certainty to Table 3's lines; none where r isn't the paper's."""
    ratio = lines["slow_mode_ratio"]
    has_other_ratio = ratio.notna() & (ratio != DEFAULTS["slow_mode_ratio"]) | lines["slow_steps"].notna()
    values = pd.DataFrame([ABLATION[step] for step in lines["step"]], index=lines.index)
    values = values.where((lines["step"] == 0) | ~has_other_ratio)
    return lines.assign(rel_paper=values["value"], rel_paper_certainty=values["certainty"])


def _values_of(line: dict[str, Any]) -> dict[str, Any]:
    family = FAMILIES.get(line["model"])
    if family is None or line["method"] != "dualspeed":
        return {}
    if any(line[name] != DEFAULTS[name] for name in SETTINGS if not pd.isna(line[name])):
        return {}
    rel, speedup = RELATIVE[family], SPEEDUP[family]
    return {
        "rel_paper": rel.value,
        "rel_paper_certainty": rel.certainty,
        "speedup_paper": speedup.value,
        "speedup_paper_certainty": speedup.certainty,
    }
