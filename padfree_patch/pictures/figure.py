"""What all pictures share: matplotlib, if it is installed, and the colours."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

from ..errors import PadfreeError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OWN, OTHER, NOTHING, INK = "#1f6feb", "#d4351c", "#e4e8ed", "#24292f"
EXAMPLES = ("#1f6feb", "#2da44e", "#e08600", "#8250df", "#0a7f8c", "#bf3989", "#a8a200", "#7a4a21")
"""Colours of the examples of a batch, in turn."""


def check_matplotlib() -> None:
    """Raises PadfreeError if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401  # an extra: training machines need not have it
    except ImportError as error:
        raise PadfreeError("pictures need matplotlib: pip install 'padfree_patch[pictures]'") from error


def new_figure(width: float, height: float) -> Figure:
    """Makes a figure of so many inches that belongs to no window, and that a notebook shows.

    Raises PadfreeError if matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    class Picture(Figure):
        """A figure that a notebook shows without pyplot."""

        def _repr_png_(self) -> bytes:
            written = BytesIO()
            self.savefig(written, format="png", dpi=110)
            return written.getvalue()

    return Picture(figsize=(width, height), layout="constrained")
