"""Attention alone, forward and backward: every backend that runs here, how fast and how exact, over sets of lengths.

    .venv/bin/nox -s benchmark -- attention

1.00 is one call of PyTorch's private CPU operator per sequence, inside one autograd function that writes into results
made before. Lengths are drawn anew every round, as in training. "public function" is the sdpa backend without what is
private to PyTorch. Errors are against float64, largest error over largest value.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import torch
from common import legend_above, progress, save
from matplotlib.figure import Figure
from torch import Tensor
from torch.autograd.function import once_differentiable

from padfree_patch import PackedSequences, attention
from padfree_patch.attention import cpu
from padfree_patch.attention.per_sequence import split_by_sequence
from padfree_patch.measure.step import flan_like_lengths

LENGTH_SETS: dict[str, Callable[[torch.Generator], list[int]]] = {
    "flan": lambda g: list(flan_like_lengths(64, g)),
    "math": lambda g: (330 + 90 * torch.randn(16, generator=g)).clamp(50).long().tolist(),
    "tiny": lambda g: torch.randint(4, 41, (256,), generator=g).tolist(),
    "one": lambda g: [2048],
    "long": lambda g: [4096, 1500, 2500],
}
SHAPES = {"9/3/64": ["flan", "math", "tiny", "one", "long"], "8/8/128": ["flan", "math"], "32/8/64": ["flan", "math"]}
"""Query heads / key-value heads / head size, and the sets that each is measured on."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BASELINE, PUBLIC = "operator per sequence", "public function"


class OperatorPerSequence(torch.autograd.Function):
    """Computes what is called 1.00: a private operator per sequence, in one autograd function."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        out, lse = torch.empty_like(q), torch.empty(q.shape[:2])
        for q_, k_, v_, out_, lse_ in split_by_sequence(tuple(lengths), q, k, v, out, lse):
            result, its_lse = operator(q_, k_, v_, 0.0, True, scale=scale)
            out_.copy_(result)
            lse_.copy_(its_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = lengths, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        q, k, v, out, lse = ctx.saved_tensors
        lengths, scale = ctx.options
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        for *needed, dq, dk, dv in split_by_sequence(tuple(lengths), dout, q, k, v, out, lse, *gradients):
            for to, gradient in zip((dq, dk, dv), operator(*needed, 0.0, True, scale=scale)):
                to.copy_(gradient)
        return *gradients, None, None


@click.command()
@click.option("--rounds", default=5, show_default=True)
def main(rounds: int) -> None:
    """Time and compare."""
    jobs = [(dtype, shape, lengths) for dtype in DTYPES for shape, sets in SHAPES.items() for lengths in sets]
    speeds, errors = [], []
    with progress() as bar:
        task = bar.add_task("", total=len(jobs) + len(DTYPES))
        for dtype, shape, lengths in jobs:
            bar.update(task, description=f"{dtype} {shape} {lengths}")
            speeds.append(speed(dtype, shape, lengths, rounds))
            bar.advance(task)
        for dtype in DTYPES:
            bar.update(task, description=f"errors, {dtype}")
            errors += [error(dtype, name, attend) for name, attend in candidates(dtype, 64).items()]
            bar.advance(task)
    save("attention", {"speeds": speeds, "errors": errors}, picture(speeds))


def candidates(dtype: str, head_dim: int) -> dict[str, Callable[..., Tensor]]:
    """Returns the baseline, the backends that run here, and the public function, by name."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    needs = attention.Needs(device, DTYPES[dtype], head_dim)
    found: dict[str, Callable[..., Tensor]] = {}
    if device == "cpu":
        found[BASELINE] = lambda q, k, v, s, scale: OperatorPerSequence.apply(q, k, v, list(s.lengths), scale)
    found |= {backend.NAME: backend.attend for backend in attention.BACKENDS if backend.refusal(needs) is None}
    found[PUBLIC] = without_operators
    return found


def without_operators(*args: Any, **kwargs: Any) -> Tensor:
    """Runs the sdpa backend as on a PyTorch without the private operators: with the public function."""
    works, cpu.works = cpu.works, lambda: False
    try:
        return attention.sdpa.attend(*args, **kwargs)
    finally:
        cpu.works = works


def inputs(dtype: str, shape: str, lengths: list[int], generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
    heads, key_heads, head_dim = map(int, shape.split("/"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = [(sum(lengths), count, head_dim) for count in (heads, key_heads, key_heads, heads)]
    *qkv, dout = (torch.randn(each, generator=generator).to(device, DTYPES[dtype]) for each in shapes)
    return [x.requires_grad_() for x in qkv], dout


def timed(attend: Callable[..., Tensor], qkv: list[Tensor], dout: Tensor, lengths: list[int], **options: Any) -> float:
    sequences = PackedSequences.from_lengths(lengths, device=dout.device)
    start = time.perf_counter()
    attend(*qkv, sequences, scale=qkv[0].shape[-1] ** -0.5).backward(dout)
    if dout.is_cuda:
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    for x in qkv:
        x.grad = None
    return taken


def speed(dtype: str, shape: str, set_name: str, rounds: int) -> dict[str, Any]:
    """Returns the median over rounds of each candidate's time over the baseline's in the same round."""
    ways = candidates(dtype, int(shape.split("/")[2]))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        generator = torch.Generator().manual_seed(number)
        lengths = LENGTH_SETS[set_name](generator)
        qkv, dout = inputs(dtype, shape, lengths, generator)
        for name, attend in ways.items():
            taken = timed(attend, qkv, dout, lengths)
            if number:  # the first round warms up
                seconds[name].append(taken)
    base = next(iter(seconds.values()))
    ratios = {name: [a / b for a, b in zip(times, base)] for name, times in seconds.items()}
    return {
        "dtype": dtype,
        "shape": shape,
        "lengths": set_name,
        "milliseconds": 1e3 * statistics.median(base),
        "ratios": {name: statistics.median(each) for name, each in ratios.items()},
        "spread": {name: [min(each), max(each)] for name, each in ratios.items()},
    }


def error(dtype: str, name: str, attend: Callable[..., Tensor]) -> dict[str, Any]:
    """Measures the errors of output and worst gradient, on lengths on both sides of every change of method."""
    lengths = [1, 64, 129, 192, 193, 300, 768, 2049]
    qkv, dout = inputs(dtype, "9/3/64", lengths, torch.Generator().manual_seed(0))
    output = attend(*qkv, PackedSequences.from_lengths(lengths, device=dout.device), scale=0.125)
    found = [output, *torch.autograd.grad(output, qkv, dout)]
    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = torch.cat([in_float64(*each) for each in zip(*(x.split(lengths) for x in exact))])
    wanted = [expected, *torch.autograd.grad(expected, exact, dout.double())]
    worst = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted)]
    return {"dtype": dtype, "name": name, "output": worst[0], "gradients": max(worst[1:])}


def in_float64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes one sequence, written out: q (L, H, D), k and v (L, K, D)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * 0.125
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), v)


def picture(speeds: list[dict[str, Any]]) -> Figure:
    """Draws the ratios to the baseline, a panel per dtype."""
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    for axes, dtype in zip(figure.subplots(1, len(DTYPES), sharey=True), DTYPES):
        rows = [each for each in speeds if each["dtype"] == dtype]
        names = list(rows[0]["ratios"])
        for offset, name in enumerate(names):
            positions = [i + 0.8 / len(names) * (offset - (len(names) - 1) / 2) for i in range(len(rows))]
            axes.bar(positions, [row["ratios"][name] for row in rows], width=0.75 / len(names), label=name)
        axes.set_xticks(range(len(rows)), [f"{row['lengths']}\n{row['shape']}" for row in rows], fontsize=7)
        axes.set_title(dtype)
    figure.axes[0].set_ylabel("time, forward and backward; less is faster")
    legend_above(figure)
    return figure


if __name__ == "__main__":
    main()
