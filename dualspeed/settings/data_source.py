"""One source of a recipe's `data`: rows of a file, of a saved dataset or of the Hub, and how many of them."""

from dataclasses import dataclass
from fractions import Fraction

from dualspeed.errors import ConfigError
from dualspeed.settings.fields import check_fields, choice, number

FORMATS = ("messages", "prompt_completion", "conversations", "texts")
"""Formats of rows, by the columns that hold their text."""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Where rows come from and which of them are taken; the columns say what they are (docs/data.md)."""

    path: str | None = None
    """JSON, JSON lines, parquet, a folder of parquet files, or a dataset that `save_to_disk` wrote."""
    hub: str | None = None
    """Instead of `path`: name of a dataset on the Hub, owner/name."""
    config: str | None = None
    """Hub: configuration of the dataset; null: its only one."""
    split: str | None = None
    """Split of the dataset; null: `train` on the Hub and where several were saved together."""
    format: str | None = choice(FORMATS, default=None)
    """Format of the rows; null: the one that their columns have."""
    images: str | None = None
    """Folder that image paths start from, and that images in the rows are written to; null: the recipe's."""
    share: float | None = number(above=0, maximum=1, default=None)
    """Share of the rows that are taken, spread evenly over their order; null: all."""
    limit: int | None = number(above=0, default=None)
    """Rows that are taken from the start; null: all."""

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.path is None) == (self.hub is None):
            raise ConfigError(f"path: {self.path!r} with hub {self.hub!r}; valid: one of both")
        if self.path is not None and self.config is not None:
            raise ConfigError(f"config: {self.config!r} with path {self.path!r}; valid: with hub alone")
        if self.hub is not None and (self.hub.count("/") != 1 or self.hub != self.hub.strip("/ ")):
            raise ConfigError(f"hub: {self.hub!r} names no dataset; valid: owner/name")
        if self.share is not None and self.limit is not None:
            raise ConfigError(f"share: {self.share!r} with limit {self.limit!r}; valid: one of both")

    @property
    def name(self) -> str:
        """Name in messages and manifests: the path, or owner/name with configuration and split."""
        if self.path is not None:
            return self.path if self.split is None else f"{self.path}/{self.split}"
        return "/".join(part for part in (self.hub, self.config, self.split) if part is not None)

    def takes(self, number: int) -> bool:
        """True for a row that is taken, by its number in the source, from 0.

        A share s takes n s of any n first rows, rounded down: what it takes depends on their order alone, and a larger
        share of 1/k takes rows of every part of the data.
        """
        if self.limit is not None:
            return number < self.limit
        if self.share is None:
            return True
        share = Fraction(str(self.share))  # 0.1 exactly, not its neighbour in binary
        return int((number + 1) * share) > int(number * share)

    def num_taken(self, num_rows: int) -> int:
        """Rows that are taken of `num_rows`."""
        if self.limit is not None:
            return min(num_rows, self.limit)
        return num_rows if self.share is None else int(num_rows * Fraction(str(self.share)))
