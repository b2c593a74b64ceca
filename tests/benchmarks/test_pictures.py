"""The pictures of docs/benchmarks can be drawn from the results beside them, and no legend covers a bar."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def redraw(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("redraw")


def covered_bars(figure) -> int:
    """Counts the bars that a legend lies upon."""
    FigureCanvasAgg(figure).draw()
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    bars = [bar for axes in figure.axes for bar in axes.patches]
    assert legends and (bars or any(axes.lines for axes in figure.axes))
    return sum(bar.get_window_extent().overlaps(legend.get_window_extent()) for legend in legends for bar in bars)


def test_no_legend_covers_a_bar(redraw):
    assert {name: covered_bars(figure) for name, figure in redraw.pictures()} == dict.fromkeys(redraw.PICTURES, 0)


def test_a_legend_in_a_panel_would_cover_some(redraw):
    """The control: where matplotlib thinks best, in the first panel, as it was."""
    figure = dict(redraw.pictures())["step"]
    figure.legends.clear()
    figure.axes[0].legend()
    assert covered_bars(figure)
