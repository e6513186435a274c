"""Scenes of handwritten digits in colour on a grid, and their images.

The digits are the 1,797 of UCI's optical recognition dataset, which scikit-learn includes. 397 of them are reserved for
the test split and appear in no training image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
from PIL import Image

T = TypeVar("T")

COLOURS = {
    "red": (214, 28, 36),
    "green": (20, 150, 50),
    "blue": (30, 70, 220),
    "orange": (245, 140, 10),
    "purple": (140, 40, 170),
    "black": (25, 25, 25),
}
GRID = 14
"""Cells along a side."""
CELL = 16
"""Pixels along a cell's side; a cell is one patch of the vision tower."""
BLOTCH = 4
"""Pixels along the side of a square of the background's noise."""
NUM_TEST_DIGITS = 397
"""Handwritten samples of the test split."""


@dataclass(frozen=True)
class Item:
    """One digit of a scene: value, colour, cell (raster index), and index of the handwritten sample."""

    digit: int
    colour: str
    cell: int
    sample: int


@dataclass(frozen=True)
class Scene:
    """3 to 5 items of different digits in raster order, and the seed of the background's noise."""

    items: tuple[Item, ...]
    noise_seed: int

    def count(self, colour: str) -> int:
        """Number of items of `colour`."""
        return sum(item.colour == colour for item in self.items)

    def colour_of(self, digit: int) -> str | None:
        """Colour of `digit`, or None if it is absent."""
        return next((item.colour for item in self.items if item.digit == digit), None)


@cache
def load_handwriting() -> tuple[np.ndarray, np.ndarray]:
    """Return the digits' images as opacity in [0, 1], enlarged twice to (1797, 16, 16), and their values (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images.repeat(2, axis=1).repeat(2, axis=2).astype(np.float32) / 16, digits.target


@cache
def samples_of_digit(split: str) -> tuple[tuple[int, ...], ...]:
    """Return, for each digit 0..9, the indices of its handwritten samples in `split` (train or test)."""
    _, values = load_handwriting()
    order = np.random.RandomState(0).permutation(len(values))  # numpy guarantees RandomState's stream
    chosen = order[:-NUM_TEST_DIGITS] if split == "train" else order[-NUM_TEST_DIGITS:]
    return tuple(tuple(np.sort(chosen[values[chosen] == digit]).tolist()) for digit in range(10))


def sample_scene(rng: np.random.Generator, split: str) -> Scene:
    """Draw a scene of 3 to 5 different digits in random colours and cells, with handwritten samples of `split`."""
    size = int(rng.integers(3, 6))
    cells = np.sort(rng.permutation(GRID * GRID)[:size]).tolist()
    digits = rng.permutation(10)[:size].tolist()
    items = [
        Item(digit, pick(rng, tuple(COLOURS)), cell, pick(rng, samples_of_digit(split)[digit]))
        for cell, digit in zip(cells, digits, strict=True)
    ]
    return Scene(tuple(items), noise_seed=int(rng.integers(2**31)))


def pick(rng: np.random.Generator, values: Sequence[T]) -> T:
    """Draw one of `values`; ten times faster than rng.choice."""
    return values[int(rng.integers(len(values)))]


def draw_scene(scene: Scene) -> Image.Image:
    """Return the scene's RGB image, GRID * CELL pixels on a side."""
    # Noise in squares of 4 x 4 pixels makes a PNG of 4 kB; noise in single pixels one of 24 kB.
    side = GRID * CELL // BLOTCH
    noise = np.random.default_rng(scene.noise_seed).integers(232, 249, (side, side, 3), dtype=np.uint8)
    pixels = noise.repeat(BLOTCH, axis=0).repeat(BLOTCH, axis=1)
    handwriting, _ = load_handwriting()
    for item in scene.items:
        row, column = CELL * (item.cell // GRID), CELL * (item.cell % GRID)
        cell = pixels[row : row + CELL, column : column + CELL]
        opacity = handwriting[item.sample][..., None]
        cell[:] = (1 - opacity) * cell + opacity * np.array(COLOURS[item.colour], np.float32)
    return Image.fromarray(pixels)
