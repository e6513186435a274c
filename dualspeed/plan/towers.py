"""Vision towers with their projectors, by kind: parameters, visual tokens of an image, and the cost of encoding it.

Those that take images of any resolution are in dualspeed.plan.resolution_towers.
"""

from dataclasses import dataclass
from math import ceil, prod
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Cost of encoding the images of a sample, in FLOPs of the forward pass."""

    patches: float = 0
    """Embedding of the patches."""
    blocks: float = 0
    """Blocks of the tower."""
    entry: float = 0
    """Products of the projector whose input has no gradient while the tower is frozen."""
    projector: float = 0
    """Its other products."""
    saved_bytes: float = 0
    """Bytes that the projector saves for the backward pass, in bfloat16."""
    kept_bytes: float = 0
    """Bytes that `cache_features` keeps of the tower's outputs, in bfloat16."""


class Tower(Protocol):
    """A vision tower with its projector."""

    @property
    def parameters(self) -> int:
        """Number of parameters of the tower."""

    def projector_parameters(self, width: int) -> int:
        """Number of parameters of the projector to a language model of this width."""

    def units(self, height: int, width: int, budget: str) -> list[int]:
        """Visual tokens of each unit of pruning of an image; `budget` as `models.<model>.prune_budget`."""

    def markers(self, height: int, width: int) -> int:
        """Tokens beside them that the processor writes for an image, which are never pruned."""

    def largest(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the image with most tokens, `size` where the tokens have no limit worth the name."""

    def encoded(self, height: int, width: int, text_width: int) -> Encoded:
        """Cost of encoding an image for a language model of width `text_width`."""


@dataclass(frozen=True, kw_only=True)
class SquareTower:
    """A CLIP whose second-to-last layer two products project, patch by patch (LLaVA, LLaVA-NeXT)."""

    width: int
    """Hidden size."""
    inner: int
    """Intermediate size of its MLPs."""
    layers: int
    """Number of its blocks."""
    image_size: int
    """Pixels on a side of its input."""
    patch_size: int
    """Pixels on a side of a patch."""
    grids: tuple[tuple[int, int], ...] | None = None
    """Heights and widths, in pixels, that any-resolution images are fitted into; None: one tile an image."""

    @property
    def side(self) -> int:
        """Patches on a side of a tile."""
        return self.image_size // self.patch_size

    @property
    def parameters(self) -> int:
        """As in Tower."""
        block = 4 * self.width * (self.width + 1) + 2 * self.width * self.inner + self.inner + self.width
        embeddings = self.width * (1 + 3 * self.patch_size**2 + self.side**2 + 1)
        return embeddings + self.layers * (block + 4 * self.width) + 4 * self.width

    def projector_parameters(self, width: int) -> int:
        """As in Tower."""
        return width * (self.width + 1) + width * (width + 1) + (width if self.grids else 0)

    def tiles(self, height: int, width: int) -> list[int]:
        """Tokens of each tile of an image, without the padding that LLaVA-NeXT removes; the base view comes first."""
        whole = self.side**2
        if self.grids is None:
            return [whole]
        rows, columns = self.rows_and_columns(height, width)
        top, left = unpadded_margins(height, width, rows * self.side, columns * self.side)
        kept_rows, kept_columns = (
            [sum(margin <= place < total * self.side - margin for place in range(start, start + self.side))
             for start in range(0, total * self.side, self.side)]
            for margin, total in ((top, rows), (left, columns))
        )  # fmt: skip
        return [whole, *(a * b for a in kept_rows for b in kept_columns)]

    def rows_and_columns(self, height: int, width: int) -> tuple[int, int]:
        """Tiles in the grid that an image is fitted into."""
        assert self.grids is not None
        rows, columns = (size // self.image_size for size in best_grid((height, width), self.grids))
        return rows, columns

    def newlines(self, height: int, width: int) -> int:
        """Newline tokens of an image, one at the end of each row of patches."""
        if self.grids is None:
            return 0
        rows, columns = self.rows_and_columns(height, width)
        return rows * self.side - 2 * unpadded_margins(height, width, rows * self.side, columns * self.side)[0]

    def num_tiles(self, height: int, width: int) -> int:
        """Tiles of an image that the vision tower encodes, the base view and padded tiles included."""
        return 1 if self.grids is None else 1 + prod(self.rows_and_columns(height, width))

    def units(self, height: int, width: int, budget: str) -> list[int]:
        """As in Tower: tiles without newlines, or the image with them."""
        tiles = self.tiles(height, width)
        return tiles if budget == "tile" else [sum(tiles) + self.newlines(height, width)]

    def markers(self, height: int, width: int) -> int:
        """As in Tower: none, since newlines can be pruned."""
        return 0

    def largest(self, size: tuple[int, int]) -> tuple[int, int]:
        """As in Tower."""
        return max(self.grids or ((1, 1),), key=lambda grid: sum(self.units(grid[0], grid[1], "image")))

    def encoded(self, height: int, width: int, text_width: int) -> Encoded:
        """As in Tower, without the tower's last layer, which comes after the selected one."""
        tiles = self.num_tiles(height, width)
        tokens = tiles * self.side**2
        return Encoded(
            patches=2 * tokens * self.width * 3 * self.patch_size**2,
            blocks=(self.layers - 1) * tiles * block_flops(self.width, 2 * self.inner, self.side**2 + 1),
            entry=2 * tokens * self.width * text_width,
            projector=2 * tokens * text_width**2,
            saved_bytes=tokens * (2 * self.width + 6 * text_width),
            kept_bytes=tiles * (2 * (self.side**2 + 1) * self.width + 4 * self.side**2),
        )


@dataclass(frozen=True, kw_only=True)
class ShuffledTower:
    """A SigLIP on square tiles, whose squares of patches one product projects (Idefics3, SmolVLM)."""

    width: int
    """Hidden size."""
    inner: int
    """Intermediate size of its MLPs."""
    layers: int
    """Number of its blocks."""
    image_size: int
    """Pixels on a side of a tile."""
    patch_size: int
    """Pixels on a side of a patch."""
    factor: int
    """Patches on a side of the squares that become one token."""
    longest_edge: int
    """Pixels that the longer side of every image is scaled to, before it is cut into tiles."""

    @property
    def patches(self) -> int:
        """Patches of a tile."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def parameters(self) -> int:
        """As in Tower."""
        block = 4 * self.width * (self.width + 1) + 2 * self.width * self.inner + self.inner + self.width
        embeddings = self.width * (3 * self.patch_size**2 + 1 + self.patches)
        return embeddings + self.layers * (block + 4 * self.width) + 2 * self.width

    def projector_parameters(self, width: int) -> int:
        """As in Tower."""
        return self.width * self.factor**2 * width

    def rows_and_columns(self, height: int, width: int) -> tuple[int, int]:
        """Tiles that an image is cut into, beside the view of the whole; (0, 0) if the whole is one tile."""
        scale = self.longest_edge / max(height, width)
        sides = [int(side * scale) if side < max(height, width) else self.longest_edge for side in (height, width)]
        rows, columns = (ceil((side + side % 2) / self.image_size) for side in sides)
        return (rows, columns) if rows * columns > 1 else (0, 0)

    def units(self, height: int, width: int, budget: str) -> list[int]:
        """As in Tower: tiles, the whole last, with either budget."""
        rows, columns = self.rows_and_columns(height, width)
        return [self.patches // self.factor**2] * (rows * columns + 1)

    def markers(self, height: int, width: int) -> int:
        """As in Tower: two before each tile, one after each row, and after the whole.

        The line breaks after the last row are one token.
        """
        rows, columns = self.rows_and_columns(height, width)
        return 2 * rows * columns + rows + 3

    def largest(self, size: tuple[int, int]) -> tuple[int, int]:
        """As in Tower: a square."""
        return self.longest_edge, self.longest_edge

    def encoded(self, height: int, width: int, text_width: int) -> Encoded:
        """As in Tower."""
        units = self.units(height, width, "tile")
        squares = self.width * self.factor**2
        return Encoded(
            patches=2 * len(units) * self.patches * self.width * 3 * self.patch_size**2,
            blocks=self.layers * len(units) * block_flops(self.width, 2 * self.inner, self.patches),
            entry=2 * sum(units) * squares * text_width,
            saved_bytes=sum(units) * 2 * (squares + text_width),
            kept_bytes=2 * len(units) * self.patches * self.width,
        )


def block_flops(width: int, inner: int, positions: int) -> float:
    """FLOPs of a block's forward pass on one sequence; `inner`: widths of its MLP's products, added up."""
    return 2 * positions * (4 * width**2 + width * inner) + 4 * positions**2 * width


def best_grid(size: tuple[int, int], grids: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Grid that shows most pixels of an image of `size`, (height, width); among equals, the one with least padding."""

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(grid[1] / size[1], grid[0] / size[0])
        shown = min(int(size[0] * scale) * int(size[1] * scale), prod(size))
        return shown, shown - prod(grid)

    return max(grids, key=merit)


def unpadded_margins(height: int, width: int, rows: int, columns: int) -> tuple[int, int]:
    """Padding of an image in a grid of rows x columns patches: rows at the top, and columns on the left."""
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2
