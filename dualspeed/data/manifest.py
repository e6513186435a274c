"""Counts of a data preparation, its manifest.json, and the error if too many samples are unusable."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dualspeed.data.conversations import Problem
from dualspeed.errors import PreparationError
from dualspeed.files import sha256_of_json
from dualspeed.settings.recipe import DataRecipe

NUM_LISTED = 10
"""Dropped samples that an error lists; the manifest lists all."""


@dataclass
class Tally:
    """Counts and lists of a preparation so far, from which its manifest is made."""

    num_total: int
    """Entries of the annotations."""
    num_seen: int = 0
    """Entries checked so far."""
    num_samples: int = 0
    """Samples kept."""
    num_cut: int = 0
    """Samples truncated to max_length, of those kept."""
    num_tokens: int = 0
    """Tokens of the samples kept."""
    problems: list[Problem] = field(default_factory=list)
    """Dropped samples."""
    converted: dict[str, str] = field(default_factory=dict)
    """Image path -> pixel mode in the file and what else is converted, of images that aren't plain RGB."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Image path in the annotations -> path at which the image was found, if it differs."""
    checksums: dict[str, str] = field(default_factory=dict)
    """Image path -> SHA-256 of the file, of usable images."""

    def manifest(self) -> dict[str, Any]:
        """Return the content of manifest.json."""
        modes = Counter(f"converted from {mode}" for mode in self.converted.values())
        return {
            "num_samples": self.num_samples,
            "num_dropped": len(self.problems),
            "num_cut_at_max_length": self.num_cut,
            "num_tokens": self.num_tokens,
            "num_images": len(self.checksums),
            "images_sha256": sha256_of_json(self.checksums),
            "dropped_by_reason": count_reasons(self.problems),
            "converted_by_mode": dict(modes.most_common()),
            "dropped": [problem.to_dict() for problem in self.problems],
            "converted": [{"file": path, "mode": mode} for path, mode in self.converted.items()],
            "renamed": [{"file": path, "found": found} for path, found in self.renamed.items()],
        }


def check_share(recipe: DataRecipe, tally: Tally) -> None:
    """Raise PreparationError if more samples are unusable than the recipe allows, or if all are."""
    problems, allowed = tally.problems, recipe.max_dropped_share * tally.num_total
    if len(problems) <= allowed and len(problems) < tally.num_total:
        return
    reasons = ", ".join(f"{count} x {reason}" for reason, count in count_reasons(problems).items())
    listed = "".join(
        f"\n  {problem.id}: {problem.reason} {problem.detail} {problem.file}".rstrip()
        for problem in problems[:NUM_LISTED]
    )
    so_far = "" if tally.num_seen == tally.num_total else f" (of {tally.num_total}, where preparation stopped)"
    raise PreparationError(
        f"{recipe.annotations}: {len(problems)} of {tally.num_seen} samples{so_far} cannot be used, and "
        f"max_dropped_share {recipe.max_dropped_share} allows {int(allowed)}: {reasons}; the first of them:{listed}"
    )


def count_reasons(problems: Iterable[Problem]) -> dict[str, int]:
    """Return reason -> number of samples, the most frequent reason first."""
    return dict(Counter(problem.reason for problem in problems).most_common())
