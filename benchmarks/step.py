"""A training step on real text: padded, padding-free, upstream's native packed path, and the ceiling.

    .venv/bin/nox -s benchmark -- step --model DIR --data FILE --data FILE

DIR is SmolLM2-135M as benchmarks/get_smollm2.py makes it. Every round draws a batch, gives it to each kind in turn, and
is compared with itself only, so that a machine that is slow for a while slows all of them. The ceiling is the same
number of tokens in rows of one length, without padding, unpatched.
"""

from __future__ import annotations

import gc
import itertools
from pathlib import Path
from typing import Any

import click
import torch
from common import (
    COLOURS,
    LARGEST_PADDED,
    NAMES,
    REAL,
    SMALL,
    batches_from,
    fold,
    legend_above,
    load,
    median_of,
    progress,
    save,
)
from matplotlib.figure import Figure
from torch.autograd.profiler_util import FunctionEvent
from transformers import AutoTokenizer

from padfree_patch import applied
from padfree_patch.measure.crowding import waited_seconds
from padfree_patch.measure.step import timed_step

KINDS = ("padded", "packed", "native", "ceiling")


@click.command()
@click.option("--model", "folder", required=True, help="Folder of SmolLM2-135M.")
@click.option("--data", "files", multiple=True, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--batch-size", "batch_sizes", multiple=True, type=int, default=(4, 8, 16), show_default=True)
@click.option("--rounds", default=4, show_default=True, help="Batches per data set and batch size, 4 layers.")
@click.option("--real-rounds", default=2, show_default=True, help="The same for the real weights.")
@click.option("--max-length", default=2048, show_default=True)
def main(
    folder: str,
    files: tuple[Path, ...],
    batch_sizes: tuple[int, ...],
    rounds: int,
    real_rounds: int,
    max_length: int,
) -> None:
    """Time steps, and see where the time goes."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def drawn(file: Path, batch_size: int, count: int) -> list[list[torch.Tensor]]:
        return list(batches_from(file, tokenizer, batch_size=batch_size, count=count, max_length=max_length))

    runs: list[dict[str, Any]] = []
    profiles: dict[str, dict[str, float]] = {}
    with progress() as bar:
        counts = {name: count for name, count in ((SMALL, rounds), (REAL, real_rounds)) if count}
        task = bar.add_task("", total=len(files) * len(batch_sizes) * sum(counts.values()))
        for name, count in counts.items():
            model = load(folder, name)
            for file, batch_size in itertools.product(files, batch_sizes):
                bar.update(task, description=f"{name}, {file.name.split('.')[0]}, batch {batch_size}")
                run = {"model": name, "data": file.name.split(".")[0], "batch_size": batch_size, "rounds": []}
                batches = drawn(file, batch_size, count)
                one_round(model, batches[0][:2], KINDS, LARGEST_PADDED[name])  # warms up
                for number, examples in enumerate(batches):
                    order = KINDS[number % len(KINDS) :] + KINDS[: number % len(KINDS)]
                    run["rounds"].append(one_round(model, examples, order, LARGEST_PADDED[name]))
                    bar.advance(task)
                runs.append(run)
            profiles[name] = profile(model, drawn(files[0], 8, 1)[0])
            del model
            gc.collect()
    results = {"runs": runs, "ratios": [ratios_of(run) for run in runs], "profiles": profiles}
    save("step", results, picture(results["ratios"]))


def one_round(model: Any, examples: list[torch.Tensor], order: tuple[str, ...], most_padded: int) -> dict[str, Any]:
    """Returns the seconds of every kind on one batch; None for a padded batch that memory can't hold."""
    batches = fold(model, examples)
    padded_tokens = batches["padded"]["input_ids"].numel()
    seconds: dict[str, float | None] = {}
    waited = waited_seconds()
    for kind in order:
        fits = kind != "padded" or padded_tokens <= most_padded
        seconds[kind] = timed_step(model, batches[kind], patched=kind == "packed") if fits else None
    return {
        "lengths": [len(ids) for ids in examples],
        "padded_tokens": padded_tokens,
        "ceiling_tokens": batches["ceiling"]["input_ids"].numel(),
        "seconds": seconds,
        "waited_seconds": waited_seconds() - waited,
    }


def ratios_of(run: dict[str, Any]) -> dict[str, Any]:
    """Returns the ratios of a run's rounds, by the names of the bars."""
    rounds = run["rounds"]
    result = {key: run[key] for key in ("model", "data", "batch_size")}
    result["packed_over_ceiling"] = median_of(
        sum(r["lengths"]) / r["seconds"]["packed"] / (r["ceiling_tokens"] / r["seconds"]["ceiling"]) for r in rounds
    )
    result["attention_work_over_ceiling"] = median_of(
        sum(n * n for n in r["lengths"]) * len(r["lengths"]) / sum(r["lengths"]) ** 2 for r in rounds
    )
    result["packed_over_native"] = median_of(r["seconds"]["native"] / r["seconds"]["packed"] for r in rounds)
    result["real_tokens_per_second"] = {
        kind: median_of(sum(r["lengths"]) / r["seconds"][kind] for r in rounds if r["seconds"][kind])
        for kind in KINDS
        if any(r["seconds"][kind] for r in rounds)
    }
    if fitting := [r for r in rounds if r["seconds"]["padded"]]:
        result["packed_over_padded"] = median_of(r["seconds"]["padded"] / r["seconds"]["packed"] for r in fitting)
        result["share_of_possible"] = median_of(  # of padded tokens / real tokens
            r["seconds"]["padded"] / r["seconds"]["packed"] * sum(r["lengths"]) / r["padded_tokens"] for r in fitting
        )
    waited, taken = (
        sum(x) for x in zip(*((r["waited_seconds"], sum(filter(None, r["seconds"].values()))) for r in rounds))
    )
    result["waited_share"] = waited / (taken * torch.get_num_threads())
    return result


def profile(model: Any, examples: list[torch.Tensor]) -> dict[str, float]:
    """Returns the share of a packed step's operator time per part of the model."""
    batch = fold(model, examples)["packed"]
    vocabulary = model.config.vocab_size
    with applied(model, verify=False):
        model(**batch).loss.backward()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
            model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)
    parts: dict[str, float] = {}
    for event in profiler.events():
        part = part_of(event, vocabulary)
        parts[part] = parts.get(part, 0.0) + event.self_cpu_time_total
    total = sum(parts.values())
    return {part: time / total for part, time in sorted(parts.items(), key=lambda item: -item[1])}


def part_of(event: FunctionEvent, vocabulary: int) -> str:
    """Returns attention, linear layers, head and loss, or the rest."""
    family = [event]
    while family[-1].cpu_parent is not None:
        family.append(family[-1].cpu_parent)
    if any("_Attention" in each.name for each in family):
        return "attention"
    shapes = [shape for each in family for shape in (each.input_shapes or []) if isinstance(shape, (list, tuple))]
    if any(vocabulary in shape for shape in shapes):
        return "head and loss"
    if any(each.name in ("aten::mm", "aten::addmm", "aten::linear", "aten::matmul") for each in family):
        return "linear layers"
    return "the rest"


def picture(ratios: list[dict[str, Any]]) -> Figure:
    """Draws real tokens per second of every kind, a panel per model and data set."""
    panels = list(dict.fromkeys((each["model"], each["data"]) for each in ratios))
    figure = Figure(figsize=(3.2 * len(panels), 3.6), layout="constrained")
    for axes, (model, data) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        rows = [each for each in ratios if (each["model"], each["data"]) == (model, data)]
        for offset, kind in enumerate(KINDS):
            speeds = [row["real_tokens_per_second"].get(kind, {"median": 0.0})["median"] for row in rows]
            positions = [i + 0.2 * (offset - 1.5) for i in range(len(rows))]
            axes.bar(positions, speeds, width=0.18, color=COLOURS[kind], label=NAMES[kind])
            for position, speed in zip(positions, speeds):
                if not speed:
                    axes.text(position, 0, " over 24 GB", rotation=90, ha="center", va="bottom", fontsize=7)
        axes.set_xticks(range(len(rows)), [f"batch {row['batch_size']}" for row in rows])
        axes.set_title(f"{model}\n{data}")
    figure.axes[0].set_ylabel("real tokens per second")
    legend_above(figure)
    return figure


if __name__ == "__main__":
    main()
