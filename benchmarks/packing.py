"""Packing a data set into rows: ours beside TRL's best-fit decreasing, on the same lengths in one run.

    .venv/bin/nox -s benchmark -- packing --tokenizer DIR --data FILE --data FILE

Whole data sets into rows of 4,096 tokens, seconds (the smallest of some rounds, in turn) and the part of the rows that
stays empty; the token-budget sampler's epoch for two processes; and a million drawn lengths.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import datasets
import numpy as np
from common import progress, save
from matplotlib.figure import Figure
from transformers import AutoTokenizer

from padfree_patch import TokenBudgetBatchSampler, pack_dataset, plan_packing
from padfree_patch.measure.texts import read_texts, tokenise


@click.command()
@click.option("--tokenizer", "folder", required=True, help="Folder of the tokenizer.")
@click.option("--data", "files", multiple=True, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--max-length", default=4096, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def main(folder: str, files: tuple[Path, ...], max_length: int, rounds: int) -> None:
    """Pack, time and write."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    with progress() as bar:
        task = bar.add_task("", total=len(files) + 1)
        for file in files:
            bar.update(task, description=file.name)
            ids = tokenise(read_texts(file), tokenizer, max_length=max_length)
            data = datasets.Dataset.from_dict({"input_ids": ids})
            lengths = [len(each) for each in ids]
            rows.append({"data": file.name.split(".")[0], **compared(data, lengths, max_length, rounds)})
            bar.advance(task)
        bar.update(task, description="a million lengths")
        drawn = np.exp(np.random.default_rng(0).normal(size=1_000_000) + 4.9).clip(8, 2048).astype(np.int64)
        taken, plan = timed(lambda: plan_packing(drawn, max_length))
        sampler_taken, _ = timed(lambda: len(TokenBudgetBatchSampler(drawn, max_tokens=max_length, num_replicas=2)))
        bar.advance(task)
    million = {"plan_seconds": taken, "waste": plan.waste, "sampler_seconds": sampler_taken}
    save("packing", {"max_length": max_length, "rows": rows, "million": million}, picture(rows))


def compared(data: Any, lengths: list[int], max_length: int, rounds: int) -> dict[str, Any]:
    """Measures seconds and waste of our packing, of TRL's, and of the sampler's batches."""
    from trl import pack_dataset as trl_pack_dataset  # of one session only

    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: pack_dataset(data, max_length),
        "trl": lambda: trl_pack_dataset(data, max_length, "bfd", map_kwargs={"load_from_cache_file": False}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    packed = {}
    for _ in range(rounds):
        for name, way in ways.items():
            taken, packed[name] = timed(way)
            seconds[name].append(taken)
    found: dict[str, Any] = {"examples": len(lengths), "tokens": sum(lengths)}
    for name, each in packed.items():
        found[name] = {
            "seconds": min(seconds[name]),
            "rows": len(each),
            "waste": 1 - sum(lengths) / (len(each) * max_length),
        }
    batches = len(TokenBudgetBatchSampler(lengths, max_tokens=max_length, num_replicas=2))
    found["sampler"] = {"batches": batches, "waste": 1 - sum(lengths) / (batches * max_length)}
    return found


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Draws the seconds of our packing and of TRL's, per data set."""
    figure = Figure(figsize=(5, 2.6), layout="constrained")
    axes = figure.subplots()
    for offset, (name, colour) in enumerate((("trl", "#b0b7c3"), ("ours", "#1f6feb"))):
        positions = [i + 0.36 * (offset - 0.5) for i in range(len(rows))]
        drawn = axes.bar(positions, [row[name]["seconds"] for row in rows], width=0.34, color=colour, label=name)
        axes.bar_label(drawn, fmt="%.2f")
    axes.set_xticks(range(len(rows)), [f"{row['data']}\n{row['examples']} examples" for row in rows])
    axes.set_ylabel("seconds")
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
