"""Draws the comparison: both loss curves, and bars for speed, memory and padding."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .results import Comparison

PADDED, PADDING_FREE = "#b0b7c3", "#1f6feb"


def save_picture(comparison: Comparison, path: Path) -> None:
    """Writes the picture to `path`; the ending names the format."""
    padded, padding_free, settings = comparison.padded, comparison.padding_free, comparison.settings
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplot_mosaic([["loss", "speed", "memory", "padding"]], width_ratios=[3, 1, 1, 1])
    figure.suptitle(
        f"{settings['model']}, {settings['data']}: batch size {settings['batch_size']}, "
        f"transformers {settings['transformers']}, float32 on {settings['threads']} CPU threads",
        fontsize=10,
    )

    steps = range(1, len(padded.losses) + 1)
    loss = panels["loss"]
    loss.plot(steps, padded.losses, color=PADDED, linewidth=5, label="padded")
    loss.plot(steps, padding_free.losses, color=PADDING_FREE, linewidth=1.5, label="padding-free")
    loss.set(xlabel="step", ylabel="loss", title=f"loss: at most {max(comparison.loss_differences):.1e} apart")
    loss.legend(frameon=False)

    note = "\n(unreliable: CPU shared)" if comparison.crowded() else ""
    speeds = padded.tokens_per_second, padding_free.tokens_per_second
    bars(panels["speed"], f"real tokens per second{note}", *speeds, "{:,.0f}")
    bars(
        panels["memory"], "growth of memory, MB", padded.growth_bytes / 1e6, padding_free.growth_bytes / 1e6, "{:,.0f}"
    )
    bars(panels["padding"], "padding, %", 100 * padded.padding_share, 100 * padding_free.padding_share, "{:.0f}")
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(9)
    figure.savefig(path, dpi=150)


def bars(axes: Axes, title: str, padded: float, padding_free: float, style: str) -> None:
    """Draws one figure of both runs."""
    drawn = axes.bar(["padded", "padding-\nfree"], [padded, padding_free], color=[PADDED, PADDING_FREE], width=0.6)
    axes.bar_label(drawn, fmt=style, padding=2, fontsize=9)
    axes.set(title=title, yticks=[], ylim=(0, 1.15 * max(padded, padding_free) or 1))
    axes.spines["left"].set_visible(False)
