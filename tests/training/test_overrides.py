"""docs/method.md names each method of the stock Trainer that ours has its own of."""

import re

from transformers import Trainer

from dualspeed.training.mixin import DualSpeedMixin
from dualspeed.training.resume import ResumableTrainer
from dualspeed.training.saving import SavesStockCheckpoints
from dualspeed.training.trainer import DualSpeedTrainer
from tests.support.paths import REPOSITORY

OURS = [kind for kind in ResumableTrainer.__mro__ if kind.__module__.startswith("dualspeed.")]


def test_the_table_of_overrides_is_complete():
    page = (REPOSITORY / "docs" / "method.md").read_text(encoding="utf-8")
    section = page.partition("## What the trainer overrides")[2].partition("\n## ")[0]
    named = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
    overridden = {
        name for kind in OURS for name, value in vars(kind).items() if callable(value) and hasattr(Trainer, name)
    }
    assert {SavesStockCheckpoints, DualSpeedMixin, DualSpeedTrainer} < set(OURS)
    assert len(named) == len(set(named))
    assert set(named) == overridden
