"""Vision towers that take images of any resolution, with mergers that make a token of each square of patches."""

from dataclasses import dataclass
from math import ceil, floor, prod, sqrt

from dualspeed.plan.towers import Encoded, block_flops


@dataclass(frozen=True, kw_only=True)
class ResolutionTower:
    """Part that such towers share: an image is scaled to whole squares, and its tokens are one unit of pruning."""

    width: int
    """Hidden size."""
    inner: int
    """Intermediate size of its MLPs."""
    layers: int
    """Number of its blocks."""
    patch_size: int
    """Pixels on a side of a patch."""
    merge: int
    """Patches on a side of the squares that become one token."""
    pixels: tuple[int, int]
    """Least and most pixels of an image, to which others are scaled."""
    frames: int = 2
    """Frames that a patch spans; an image is repeated."""

    @property
    def square(self) -> int:
        """Numbers that a merger's first product reads for a token."""
        return self.width * self.merge**2

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of an image's tokens."""
        unit, (least, most) = self.patch_size * self.merge, self.pixels
        rows, columns = round(height / unit), round(width / unit)
        if rows * columns * unit**2 > most:
            scale = sqrt(height * width / most)
            return max(1, floor(height / scale / unit)), max(1, floor(width / scale / unit))
        if rows * columns * unit**2 < least:
            scale = sqrt(least / (height * width))
            return ceil(height * scale / unit), ceil(width * scale / unit)
        return rows, columns

    def units(self, height: int, width: int, budget: str) -> list[int]:
        """As in Tower: the image; there are no tiles."""
        return [prod(self.grid(height, width))]

    def markers(self, height: int, width: int) -> int:
        """As in Tower: one before the image and one after it."""
        return 2

    def largest(self, size: tuple[int, int]) -> tuple[int, int]:
        """As in Tower."""
        return size

    def embedding_parameters(self) -> int:
        """Number of weights that embed patches, without biases."""
        return 3 * self.frames * self.patch_size**2 * self.width

    def embedding_flops(self, patches: int) -> float:
        """FLOPs of embedding patches."""
        return 2 * patches * self.embedding_parameters()

    def merger_parameters(self, width: int) -> int:
        """Number of parameters of a merger's two products for a language model of this width, without its norm."""
        return self.square * (self.square + 1) + width * (self.square + 1)

    def merger_flops(self, tokens: int, width: int) -> float:
        """FLOPs of a merger's forward pass; it begins with a trained norm, so that all its products have gradients."""
        return 2 * tokens * self.square * (self.square + width)


@dataclass(frozen=True, kw_only=True)
class WindowTower(ResolutionTower):
    """A tower most of whose layers attend within windows; its MLPs are gated (Qwen2.5-VL)."""

    window: int
    """Pixels on a side of a window."""
    full_layers: int
    """Number of blocks that attend to the whole image."""

    @property
    def parameters(self) -> int:
        """As in Tower."""
        block = 4 * self.width * (self.width + 1) + 3 * self.width * self.inner + 2 * self.inner + self.width
        return self.embedding_parameters() + self.layers * (block + 2 * self.width)

    def projector_parameters(self, width: int) -> int:
        """As in Tower."""
        return self.width + self.merger_parameters(width)

    def encoded(self, height: int, width: int, text_width: int) -> Encoded:
        """As in Tower."""
        grid = self.grid(height, width)
        tokens = prod(grid)
        patches, side = tokens * self.merge**2, self.window // (self.patch_size * self.merge)
        windows = [
            min(side, grid[0] - top) * min(side, grid[1] - left) * self.merge**2
            for top in range(0, grid[0], side)
            for left in range(0, grid[1], side)
        ]
        inner = 3 * self.inner
        within = sum(block_flops(self.width, inner, window) for window in windows)
        whole = block_flops(self.width, inner, patches)
        return Encoded(
            patches=self.embedding_flops(patches),
            blocks=self.full_layers * whole + (self.layers - self.full_layers) * within,
            projector=self.merger_flops(tokens, text_width),
            # Input of the norm in float32 and bfloat16, of both products and of what is between them.
            saved_bytes=tokens * (6 * self.square + 6 * self.square + 2 * text_width),
            kept_bytes=2 * patches * self.width,
        )


@dataclass(frozen=True, kw_only=True)
class DeepStackTower(ResolutionTower):
    """A tower that attends to the whole image, with a merger behind it and others behind inner layers (Qwen3-VL)."""

    positions: int
    """Learned position embeddings, which are interpolated to an image's patches."""
    deep_layers: tuple[int, ...]
    """Indices of the blocks whose outputs mergers of their own make tokens of, for the first blocks of the language
    model."""

    @property
    def parameters(self) -> int:
        """As in Tower."""
        block = 4 * self.width * (self.width + 1) + 2 * self.width * self.inner + self.inner + self.width
        embeddings = self.embedding_parameters() + self.width + self.positions * self.width
        return embeddings + self.layers * (block + 4 * self.width)

    def projector_parameters(self, width: int) -> int:
        """As in Tower: the last merger's norm is one of patches, those of the others are of squares."""
        norms = 2 * self.width + 2 * self.square * len(self.deep_layers)
        return norms + (1 + len(self.deep_layers)) * self.merger_parameters(width)

    def encoded(self, height: int, width: int, text_width: int) -> Encoded:
        """As in Tower."""
        tokens, mergers = prod(self.grid(height, width)), 1 + len(self.deep_layers)
        patches = tokens * self.merge**2
        return Encoded(
            patches=self.embedding_flops(patches),
            blocks=self.layers * block_flops(self.width, 2 * self.inner, patches),
            projector=mergers * self.merger_flops(tokens, text_width),
            # Input of each norm in float32, of both products and of what is between them.
            saved_bytes=mergers * tokens * (4 * self.square + 6 * self.square + 2 * text_width),
            kept_bytes=2 * patches * self.width * len({*self.deep_layers, self.layers - 1}),
        )
