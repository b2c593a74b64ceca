"""Attention with a softcap, dropout or ALiBi on the CPU: what each costs beside the same attention without it.

    .venv/bin/nox -s benchmark -- attention_options

Forward and backward of the sdpa backend, processor seconds of one thread, each option and plain attention in turn on
the same lengths, which are new in every round. Two bounds are measured with them: what torch needs alone to draw which
weights are dropped, and what the backend's own draws need, each once in the forward and once in the backward.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click
import torch
from common import legend_above, median_of, progress, save
from matplotlib.figure import Figure
from torch import Tensor

from attention import DTYPES, LENGTH_SETS, inputs
from padfree_patch import PackedSequences
from padfree_patch.attention import sdpa
from padfree_patch.attention.dropped import Kept

SHAPES = ("9/3/64", "8/8/128", "32/8/64")
SETS = ("flan", "math")
CHANCE = 0.1
OPTIONS: dict[str, dict[str, Any]] = {
    "softcap 30": {"softcap": 30.0},
    "dropout 0.1": {"dropout": CHANCE},
    "ALiBi": {"key_bias": True},
    "window 256": {"window": 256},
}
DRAWS = {"torch's draws alone": "torch", "our draws alone": "ours"}
BLOCK = 2**17
"""Weights that are drawn at once, about as many as the backend draws."""


@click.command()
@click.option("--rounds", default=5, show_default=True)
def main(rounds: int) -> None:
    """Time every option on every shape."""
    torch.set_num_threads(1)
    jobs = [(dtype, shape, lengths) for dtype in DTYPES for shape in SHAPES for lengths in SETS]
    found = []
    with progress() as bar:
        task = bar.add_task("", total=len(jobs))
        for job in jobs:
            bar.update(task, description=" ".join(job))
            found.append(measured(*job, rounds))
            bar.advance(task)
    save("attention_options", {"found": found}, picture(found))


def measured(dtype: str, shape: str, set_name: str, rounds: int) -> dict[str, Any]:
    """Returns the time of each option over that of plain attention in the same round: median, smallest, largest."""
    ratios: dict[str, list[float]] = {name: [] for name in (*OPTIONS, *DRAWS)}
    for number in range(rounds + 1):
        generator = torch.Generator().manual_seed(number)
        lengths = LENGTH_SETS[set_name](generator)
        seconds = seconds_of(dtype, shape, lengths, generator)
        if number:  # the first round warms up
            for name, each in ratios.items():
                each.append(seconds[name] / seconds["plain"])
    found = {name: median_of(each) for name, each in ratios.items()}
    return {"dtype": dtype, "shape": shape, "lengths": set_name, "ratios": found}


def seconds_of(dtype: str, shape: str, lengths: list[int], generator: torch.Generator) -> dict[str, float]:
    qkv, dout = inputs(dtype, shape, lengths, generator)
    sequences = PackedSequences.from_lengths(lengths)
    scale = qkv[0].shape[2] ** -0.5
    slopes = 2.0 ** -torch.arange(1, qkv[0].shape[1] + 1)
    bias = slopes[:, None] * sequences.position_ids() / scale

    def attend(options: dict[str, Any]) -> None:
        given = {**options, "key_bias": bias} if "key_bias" in options else options
        sdpa.attend(*qkv, sequences, scale=scale, **given).backward(dout)
        for x in qkv:
            x.grad = None

    seconds = {name: timed(attend, options) for name, options in {"plain": {}, **OPTIONS}.items()}
    weights = qkv[0].shape[1] * sum(length * (length + 1) // 2 for length in lengths)
    return seconds | {name: timed(draw_twice, weights, who) for name, who in DRAWS.items()}


def timed(run: Callable[..., None], *arguments: object) -> float:
    start = time.process_time()
    run(*arguments)
    return time.process_time() - start


def draw_twice(weights: int, who: str) -> None:
    """Draws which of so many weights are kept, for a forward and for its backward."""
    kept, block = Kept(CHANCE, 0), torch.empty(BLOCK)
    draw: Callable[[Tensor], Tensor] = (
        (lambda x: kept.drop(x, x)) if who == "ours" else lambda x: x.bernoulli_(1 - CHANCE)
    )
    for _ in range(2 * weights // BLOCK):
        draw(block)


def picture(found: list[dict[str, Any]]) -> Figure:
    """Draws the ratios to plain attention, a panel per dtype."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, dtype in zip(figure.subplots(1, len(DTYPES), sharey=True), DTYPES):
        rows = [each for each in found if each["dtype"] == dtype]
        for number, name in enumerate(OPTIONS):
            places = [place + 0.2 * (number - (len(OPTIONS) - 1) / 2) for place in range(len(rows))]
            axes.bar(places, [row["ratios"][name]["median"] for row in rows], width=0.18, label=name)
        axes.axhline(1, color="#57606a", linewidth=0.8)
        axes.set_xticks(range(len(rows)), [f"{row['lengths']}\n{row['shape']}" for row in rows], fontsize=7)
        axes.set_title(dtype)
    figure.axes[0].set_ylabel("time over plain attention")
    legend_above(figure)
    return figure


if __name__ == "__main__":
    main()
