"""Counts of a data preparation, its manifest.json, and the error if too many samples are unusable."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dualspeed.data.conversations import Problem
from dualspeed.data.lengths import TruncatedLength
from dualspeed.errors import PreparationError
from dualspeed.files import sha256_of_json
from dualspeed.settings.recipe import DataRecipe

NUM_LISTED = 10
"""Dropped samples that an error lists; the manifest lists all."""


@dataclass
class Tally:
    """Counts and lists of a preparation so far, from which its manifest is made."""

    num_total: int | None
    """Entries of the data; None: not known before all are checked."""
    sources: dict[str, str | None] = field(default_factory=dict)
    """Name of each source of `data` -> its commit on the Hub; empty for annotations."""
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
    problems_of: dict[str, list[Problem]] = field(default_factory=lambda: defaultdict(list))
    """The same by source."""
    num_samples_of: Counter[str] = field(default_factory=Counter)
    """Samples kept by source."""
    converted: dict[str, str] = field(default_factory=dict)
    """Image path -> pixel mode in the file and what else is converted, of images that aren't plain RGB."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Image path in the annotations -> path at which the image was found, if it differs."""
    checksums: dict[str, str] = field(default_factory=dict)
    """Image path -> SHA-256 of the file, of usable images."""

    def drop(self, problem: Problem, source: str) -> None:
        """Count and list a dropped sample."""
        self.problems.append(problem)
        self.problems_of[source].append(problem)

    def keep(self, length: TruncatedLength, source: str) -> None:
        """Count a sample that is kept."""
        self.num_samples += 1
        self.num_samples_of[source] += 1
        self.num_tokens += length.num_tokens
        self.num_cut += length.is_cut

    def dropped(self) -> str:
        """Return the sentence that counts the dropped samples by reason."""
        reasons = ", ".join(f"{count} x {reason}" for reason, count in count_reasons(self.problems).items())
        return f"{len(self.problems)} of {self.num_seen} samples cannot be used: {reasons}"

    def manifest(self) -> dict[str, Any]:
        """Return the content of manifest.json; the counts by source are there for `data` alone."""
        modes = Counter(f"converted from {mode}" for mode in self.converted.values())
        by_source = [
            {
                "source": name,
                "commit": commit,
                "num_samples": self.num_samples_of[name],
                "num_dropped": len(self.problems_of[name]),
                "dropped_by_reason": count_reasons(self.problems_of[name]),
            }
            for name, commit in self.sources.items()
        ]
        return ({"sources": by_source} if by_source else {}) | {
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
    """Raise PreparationError if more samples are unusable than the recipe allows, or if all are.

    While their number is not known, the share of those that were checked is not that of all; but none of them usable is
    taken for none at all.
    """
    problems, num_total = tally.problems, tally.num_seen if tally.num_total is None else tally.num_total
    allowed = recipe.max_dropped_share * num_total
    if len(problems) < num_total and (len(problems) <= allowed or tally.num_total is None):
        return
    reasons = ", ".join(f"{count} x {reason}" for reason, count in count_reasons(problems).items())
    listed = "".join(
        f"\n  {problem.id}: {problem.reason} {problem.detail} {problem.file}".rstrip()
        for problem in problems[:NUM_LISTED]
    )
    known = "of an unknown number" if tally.num_total is None else f"of {tally.num_total}"
    so_far = "" if tally.num_seen == tally.num_total else f" ({known}, where preparation stopped)"
    raise PreparationError(
        f"{recipe.data_name}: {len(problems)} of {tally.num_seen} samples{so_far} cannot be used, and "
        f"max_dropped_share {recipe.max_dropped_share} allows {int(allowed)}: {reasons}; the first of them:{listed}"
    )


def count_reasons(problems: Iterable[Problem]) -> dict[str, int]:
    """Return reason -> number of samples, the most frequent reason first."""
    return dict(Counter(problem.reason for problem in problems).most_common())
