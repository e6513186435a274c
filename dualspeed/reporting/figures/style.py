"""Style of all figures, and their writer: png for screens, svg for print, the same bytes for the same numbers."""

import io
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from dualspeed.files import write_atomic

# Okabe and Ito's palette, safe for colour-blind readers; each method has its own marker as well.
COLORS = {"baseline": "#4D4D4D", "naive_prune": "#D55E00", "dualspeed": "#0072B2"}
MARKERS = {"baseline": "*", "naive_prune": "s", "dualspeed": "o"}
LIGHT, DARK, ORANGE, GREY = "#9CCBEB", "#0072B2", "#E69F00", "#BBBBBB"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "dualspeed",  # else ids in the svg differ from run to run
}


def styled() -> AbstractContextManager[None]:
    """Context manager that applies this style to the figures drawn in it."""
    return matplotlib.rc_context(STYLE)


def write_figure(figure: Figure, path: Path) -> None:
    """Write `path` with the suffixes .png and .svg; call it inside `styled`."""
    for suffix, metadata in {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}.items():
        content = io.BytesIO()
        figure.savefig(content, format=suffix, dpi=200, metadata=metadata)
        write_atomic(path.with_suffix(f".{suffix}"), content.getvalue())


def empty_figure(text: str) -> Figure:
    """Figure that shows only a text, instead of missing results."""
    figure = Figure(figsize=(5, 1.5))
    figure.text(0.5, 0.5, text, ha="center", va="center")
    return figure
