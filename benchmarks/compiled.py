"""torch.compile and padding-free: a compiled step against one as it is, and against a compiled step on padded batches.

    .venv/bin/nox -s benchmark -- compiled

Forward and backward of a Llama with random weights, as wide as SmolLM2-135M, on flan-like lengths, on one thread. All
kinds get the same examples in turn, and other lengths every round; they are timed in processor seconds of the process.
What compiling takes is left out, and shown by itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import torch
from common import COLOURS, median_of, progress, save, small_model
from matplotlib.figure import Figure
from torch._dynamo.utils import counters

import padfree_patch
from padfree_patch import PackedSequences
from padfree_patch.attention import sdpa
from padfree_patch.measure.step import flan_like_lengths, step_batches

VOCABULARY = 8192
KINDS = ("padded", "padded, compiled", "packed", "packed, compiled")


@click.command()
@click.option("--layers", default=4, show_default=True)
@click.option("--batch-size", default=8, show_default=True, help="Examples in each batch.")
@click.option("--rounds", default=5, show_default=True, help="Batches; all kinds get each.")
def main(layers: int, batch_size: int, rounds: int) -> None:
    """Compile, and time every kind."""
    torch.set_num_threads(1)
    models = {kind: made(layers, patched="packed" in kind) for kind in KINDS}
    calls = {kind: torch.compile(model) if "compiled" in kind else model for kind, model in models.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    compiling = dict.fromkeys(KINDS, 0.0)
    apart = 0.0
    with progress() as bar:
        task = bar.add_task("", total=rounds + 3)
        for number in range(rounds + 3):
            bar.update(task, description=f"batch {number}")
            batches = drawn(batch_size, seed=number)
            losses = {}
            for kind in KINDS[number % 4 :] + KINDS[: number % 4]:
                taken, losses[kind] = timed_step(calls[kind], models[kind], batches[kind.partition(",")[0]])
                if number < 3:  # graphs are made for the first lengths, and for any
                    compiling[kind] += taken
                else:
                    seconds[kind].append(taken)
            apart = max(apart, *(abs(each / losses["padded"] - 1) for each in losses.values()))
            bar.advance(task)
    results = {
        "layers": layers,
        "batch_size": batch_size,
        "seconds": seconds,
        "first_three_seconds": compiling,
        "compiled_over_as_it_is": ratio(seconds, "packed", "packed, compiled"),
        "compiled_over_compiled_padded": ratio(seconds, "padded, compiled", "packed, compiled"),
        "as_it_is_over_padded": ratio(seconds, "padded", "packed"),
        "operator_over_attention": operator_over_attention(batch_size),
        "graph_breaks": sum(counters["graph_break"].values()),
        "largest_difference_of_loss": apart,
    }
    print({name: value for name, value in results.items() if name not in ("seconds", "first_three_seconds")})
    save("compiled", results, picture(results))


def made(layers: int, *, patched: bool) -> Any:
    """Makes the same model every time."""
    torch.manual_seed(0)
    model = small_model(layers=layers, vocabulary=VOCABULARY).train()
    return padfree_patch.apply(model) if patched else model


def drawn(batch_size: int, *, seed: int) -> dict[str, dict[str, Any]]:
    """Returns one batch of random tokens, in every form of a step."""
    generator = torch.Generator().manual_seed(seed)
    lengths = flan_like_lengths(batch_size, generator, longest=512)
    return step_batches([torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths])


def timed_step(call: Any, model: Any, batch: dict[str, Any]) -> tuple[float, float]:
    """Returns the processor seconds of one forward and backward, and the loss; the gradients are dropped."""
    start = time.process_time()
    loss = call(**batch, use_cache=False).loss
    loss.backward()
    taken = time.process_time() - start
    model.zero_grad(set_to_none=True)
    return taken, loss.item()


def operator_over_attention(batch_size: int, rounds: int = 30) -> float:
    """Returns the time of the graph's operator, whose backward computes the forward again, over that of attention."""
    from padfree_patch.seams.graph import attend

    generator = torch.Generator().manual_seed(0)
    sequences = PackedSequences.from_lengths(flan_like_lengths(batch_size, generator, longest=512))
    q, k, v = (torch.randn(1, heads, sequences.total, 64, requires_grad=True) for heads in (9, 3, 3))

    def plain() -> torch.Tensor:
        return sdpa.attend(*(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)), sequences, scale=0.125)

    def operator() -> torch.Tensor:
        return attend(q, k, v, sequences.cu_seqlens, None, 0, 0.125, 0.0, 0.0, "sdpa")

    ways: tuple[Callable[[], torch.Tensor], ...] = (plain, operator)
    seconds: tuple[list[float], ...] = ([], [])
    for _ in range(rounds):
        for way, times in zip(ways, seconds):
            start = time.process_time()
            way().sum().backward()
            times.append(time.process_time() - start)
    return statistics.median(seconds[1]) / statistics.median(seconds[0])


def ratio(seconds: dict[str, list[float]], one: str, other: str) -> dict[str, float]:
    """Returns how many times as fast the other kind is, on the same batches."""
    return median_of(slow / fast for slow, fast in zip(seconds[one], seconds[other]))


def picture(results: dict[str, Any]) -> Figure:
    """Draws the speed of every kind over that of the padded step."""
    figure = Figure(figsize=(5.5, 2.4), layout="constrained")
    axes = figure.subplots()
    speeds = {kind: ratio(results["seconds"], "padded", kind)["median"] for kind in KINDS}
    colours = [COLOURS["packed" if "packed" in kind else "padded"] for kind in KINDS]
    names = [kind.replace("packed", "padding-free") for kind in KINDS]
    axes.bar_label(axes.barh(names, list(speeds.values()), color=colours), fmt="%.2f x", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_title("speed of a step, over padded")
    return figure


if __name__ == "__main__":
    main()
