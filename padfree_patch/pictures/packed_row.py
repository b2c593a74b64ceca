"""Draws which token of a packed row sees which: a panel per way of running the model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..verification.sight import NOT, SEES, SEES_OTHER, Sight
from .figure import INK, NOTHING, OTHER, OWN, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {SEES: OWN, SEES_OTHER: OTHER, NOT: NOTHING}
_MEANINGS = {SEES: "sees", SEES_OTHER: "sees a token of another example", NOT: "does not see"}


def draw(panels: Mapping[str, Sight], *, title: str = "") -> Figure:
    """Draws a square of tokens for each panel, by its caption: a row for each token, a column for each that it may see.

    Raises PadfreeError if matplotlib is not installed.
    """
    figure = new_figure(max(5.0, 3.9 * len(panels)), 4.8 if title else 4.5)
    for axes, (caption, sight) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        _draw_sight(axes, sight)
        axes.set_title(f"{caption}\n{_counted(sight)}", fontsize=9.5, color=INK)
    if title:
        figure.suptitle(title, fontsize=10.5, color=INK)
    from matplotlib.patches import Patch

    keys = [Patch(facecolor=_COLOURS[sign], label=meaning) for sign, meaning in _MEANINGS.items()]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=8.5)
    return figure


def _counted(sight: Sight) -> str:
    mixed = sight.mixed_pairs()
    return f"{mixed} pairs of tokens mix across the boundary" if mixed else "no token sees another example"


def _draw_sight(axes: Axes, sight: Sight) -> None:
    """Draws the tokens as cells, and the boundaries between examples as lines."""
    from matplotlib.colors import to_rgb

    lines = str(sight).splitlines()
    axes.imshow([[to_rgb(_COLOURS[sign]) for sign in line] for line in lines])
    tokens = len(lines)
    edges = [place - 0.5 for place in range(1, tokens)]
    for draw_lines in (axes.hlines, axes.vlines):
        draw_lines(edges, -0.5, tokens - 0.5, color="white", linewidth=1.2)
    axes.tick_params(length=0)
    ends = [0, *itertools.accumulate(sight.lengths)]
    for end in ends[1:-1]:
        axes.axhline(end - 0.5, color=INK, linewidth=1.4)
        axes.axvline(end - 0.5, color=INK, linewidth=1.4)
    middles = [(start + end - 1) / 2 for start, end in itertools.pairwise(ends)]
    names = [f"example {chr(ord('A') + place)}" for place in range(len(middles))]
    axes.set_xticks(middles, names, fontsize=8.5, color=INK)
    axes.set_yticks(middles, names, fontsize=8.5, color=INK, rotation=90, va="center")
    axes.set_xlabel("token that is seen", fontsize=8.5, color=INK)
    axes.set_ylabel("token that sees", fontsize=8.5, color=INK)
    axes.spines[:].set_visible(False)
