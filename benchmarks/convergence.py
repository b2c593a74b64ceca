"""A training run on real data: padded, padding-free, and naively packed, on the same batches.

    .venv/bin/nox -s benchmark -- convergence --model DIR --data FILE

The first four layers of SmolLM2-135M (benchmarks/get_smollm2.py), AdamW, float32. Naive: the padding-free batches in an
unpatched model without position_ids, so that examples see each other. Control: the padding-free run again on one
thread, whose sums come in another order. All validation losses are of the unpatched model on padded held-out examples.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import click
import torch
from common import COLOURS, NAMES, batches_from, progress, save
from matplotlib.figure import Figure
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer

import padfree_patch
from padfree_patch.measure.step import step_batches

BOUND = 10
"""How many times the control's difference a padded step's loss may be off: two orders of summation, not one."""
KINDS = ("padded", "packed", "naive", "control")
COLOUR_OF = {**COLOURS, "naive": "#cf222e", "control": "#8250df"}
NAME_OF = {**NAMES, "naive": "naively packed", "control": "padding-free, one thread"}


@click.command()
@click.option("--model", "folder", required=True, help="Folder of SmolLM2-135M.")
@click.option("--data", "file", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--steps", default=100, show_default=True)
@click.option("--batch-size", default=4, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--max-length", default=512, show_default=True)
@click.option("--learning-rate", default=3e-4, show_default=True)
def main(
    folder: str, file: Path, steps: int, batch_size: int, layers: int, max_length: int, learning_rate: float
) -> None:
    """Train, compare and write."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    held_out = 16  # batches
    drawn = list(batches_from(file, tokenizer, batch_size=batch_size, count=steps + held_out, max_length=max_length))
    batches, validation = drawn[:steps], drawn[steps:]
    runs = {}
    with progress() as bar:
        for kind in KINDS:
            runs[kind] = run(copy.deepcopy(model), kind, batches, validation, learning_rate, bar)
    differences = {
        other: [abs(a - b) for a, b in zip(runs["packed"]["losses"], runs[other]["losses"])]
        for other in ("padded", "naive", "control")
    }
    settings = {
        "data": file.name.split(".")[0],
        "steps": steps,
        "batch_size": batch_size,
        "layers": layers,
        "learning_rate": learning_rate,
        "held_out": held_out * batch_size,
        "bound": BOUND,
        "validation_before": evaluated(model, validation),
    }
    largest = {other: max(each) for other, each in differences.items()}
    save("convergence", {"settings": settings, "runs": runs, "largest_difference": largest}, picture(runs, differences))
    if largest["padded"] > BOUND * largest["control"]:
        raise SystemExit(
            f"padded and padding-free are {largest['padded']:.1e} apart, the control {largest['control']:.1e}"
        )


def run(
    model: Any, kind: str, batches: list[Any], validation: list[Any], learning_rate: float, bar: Progress
) -> dict[str, Any]:
    """Returns the losses step by step, and the validation loss at the end."""
    threads = torch.get_num_threads()
    if kind == "control":
        torch.set_num_threads(1)
    if kind in ("packed", "control"):
        padfree_patch.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    losses = []
    model.train()
    for examples in bar.track(batches, description=NAME_OF[kind]):
        batch = step_batches(examples)["padded" if kind == "padded" else "packed"]
        if kind == "naive":
            batch = {name: batch[name] for name in ("input_ids", "labels")}
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    torch.set_num_threads(threads)
    padfree_patch.restore(model)
    return {"losses": losses, "validation_loss": evaluated(model, validation)}


@torch.no_grad()
def evaluated(model: Any, validation: list[Any]) -> float:
    """Returns the mean loss per token of padded batches."""
    model.eval()
    total, tokens = 0.0, 0
    for examples in validation:
        batch = step_batches(examples)["padded"]
        count = int((batch["labels"][:, 1:] != -100).sum())
        total += model(**batch, use_cache=False).loss.item() * count
        tokens += count
    return total / tokens


def picture(runs: dict[str, Any], differences: dict[str, list[float]]) -> Figure:
    """Draws the curves, and how far each is from the padding-free one."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    curves, apart = figure.subplots(1, 2)
    for kind, width in (("padded", 4), ("packed", 1.5), ("naive", 1)):
        label = f"{NAME_OF[kind]}, validation {runs[kind]['validation_loss']:.4f}"
        curves.plot(runs[kind]["losses"], color=COLOUR_OF[kind], linewidth=width, label=label)
    for kind, each in differences.items():
        apart.semilogy([value + 1e-9 for value in each], color=COLOUR_OF[kind], label=NAME_OF[kind])
    curves.set(xlabel="step", ylabel="training loss")
    apart.set(xlabel="step", title="difference of the loss from the padding-free run")
    for axes in (curves, apart):
        axes.legend(frameon=False, fontsize=7)
    return figure


if __name__ == "__main__":
    main()
