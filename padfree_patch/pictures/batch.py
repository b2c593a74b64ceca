"""A real batch as rows of examples: what padding it would have, and the one packed row that it becomes."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

from ..arguments import whole_numbers
from ..errors import PadfreeError
from .figure import EXAMPLES, INK, NOTHING, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 64
"""Width of the picture in letters."""


@dataclasses.dataclass(frozen=True)
class BatchPicture:
    """The examples of one batch, by their lengths in tokens.

    >>> BatchPicture((1, 3)).padded
    6
    """

    lengths: tuple[int, ...]
    source: str = ""
    """Where they come from, in words."""

    def __post_init__(self) -> None:
        """Raises PadfreeError unless there are examples, each with a token at least."""
        lengths = whole_numbers(self.lengths, "lengths")
        if not len(lengths) or lengths.min() < 1:
            raise PadfreeError(f"a batch has examples of a token at least, found lengths {list(self.lengths)}")

    @property
    def real(self) -> int:
        """Tokens of the examples."""
        return sum(self.lengths)

    @property
    def padded(self) -> int:
        """Tokens of the same batch with every example padded to the longest."""
        return len(self.lengths) * max(self.lengths)

    @property
    def padding_share(self) -> float:
        """Part of the padded batch that is padding."""
        return 1 - self.real / self.padded

    def as_dict(self) -> dict[str, object]:
        """Gives what was counted, ready for JSON."""
        counts = {"real_tokens": self.real, "padded_tokens": self.padded, "padding_share": self.padding_share}
        return {"lengths": list(self.lengths), **counts, "source": self.source}

    def __str__(self) -> str:
        """Draws the batch in letters: # is text, a dot is padding, and | a boundary in the packed row."""
        longest = max(self.lengths)
        bars = (max(1, round(_COLUMNS * length / longest)) for length in self.lengths)
        rows = [f"  {'#' * bar:.<{_COLUMNS}} {length:,}" for bar, length in zip(bars, self.lengths)]
        share = min(1.0, _COLUMNS / self.real)  # of a column per token, if the whole row is to fit
        packed = "|".join("#" * max(1, round(share * length)) for length in self.lengths)
        return "\n".join(
            [
                *([self.source] if self.source else []),
                self._padded_caption(),
                *rows,
                self._packed_caption(),
                f"  {packed}",
            ]
        )

    def _padded_caption(self) -> str:
        return f"padded: {len(self.lengths)} x {max(self.lengths):,} tokens, {self.padding_share:.0%} padding"

    def _packed_caption(self) -> str:
        return f"packed: 1 x {self.real:,} tokens, no padding"

    def plot(self) -> Figure:
        """Draws both batches with the same size for a token, as a matplotlib figure.

        Raises PadfreeError if matplotlib is not installed.
        """
        rows = len(self.lengths)
        figure = new_figure(9, 1.9 + 0.22 * rows)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[rows, 1])
        for row, length in enumerate(self.lengths):
            _bar(above, row, 0, max(self.lengths), NOTHING)
            _bar(above, row, 0, length, EXAMPLES[row % len(EXAMPLES)])
        for row, (start, end) in enumerate(itertools.pairwise([0, *itertools.accumulate(self.lengths)])):
            _bar(below, 0, start, end - start, EXAMPLES[row % len(EXAMPLES)])
        for axes, caption, count in ((above, self._padded_caption(), rows), (below, self._packed_caption(), 1)):
            axes.set_title(caption, fontsize=9.5, color=INK, loc="left")
            axes.set_ylim(count - 0.5, -0.5)
            axes.set_yticks([])
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(labelsize=8.5)
        above.set_xlim(0, self.real)
        above.spines["bottom"].set_visible(False)
        above.tick_params(length=0)
        below.set_xlabel("tokens; a colour is an example, grey is padding", fontsize=8.5, color=INK)
        if self.source:
            figure.suptitle(self.source, fontsize=10.5, color=INK)
        return figure


def _bar(axes: Axes, row: int, start: int, length: int, colour: str) -> None:
    axes.barh(row, length, left=start, height=0.78, color=colour, edgecolor="white", linewidth=0.8)
