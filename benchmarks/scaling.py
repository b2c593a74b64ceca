"""Cost against tokens per row, at sequences of one length: linear, beside the native path's T x T mask.

    .venv/bin/nox -s benchmark -- scaling

Forward and backward of a 4-layer Llama of SmolLM2-135M's width (vocabulary 8,192). Native: upstream unpatched on sdpa
with position_ids and use_cache off, the call on which it isolates examples. Ceiling: a row per sequence, unpatched.

glibc gives every block over 32 MB back to the system when it is freed, so that it comes back as fresh pages; from
about 8,000 tokens in a row all kinds pay for page faults, and the lines bend. MALLOC_MMAP_MAX_=0 and a
large MALLOC_TRIM_THRESHOLD_ in the environment keep the blocks; the nox session sets them.
"""

from __future__ import annotations

import statistics
from typing import Any

import click
import numpy as np
import torch
from common import COLOURS, NAMES, progress, save, small_model
from matplotlib.figure import Figure

from padfree_patch.measure.step import step_batches, timed_step


@click.command()
@click.option("--length", default=256, show_default=True, help="Tokens per sequence.")
@click.option("--rounds", default=2, show_default=True)
@click.option("--most-native", default=16384, show_default=True, help="Tokens up to which the native path is run.")
@click.option("--most", default=32768, show_default=True, help="Tokens of the longest row.")
def main(length: int, rounds: int, most_native: int, most: int) -> None:
    """Time rows of 1,024 tokens, 2,048, and so on."""
    torch.manual_seed(0)
    model = small_model()
    sizes = [1024 * 2**i for i in range(32) if 1024 * 2**i <= most]
    rows = []
    with progress() as bar:
        task = bar.add_task("", total=sum(sizes))
        for tokens in sizes:
            bar.update(task, description=f"{tokens} tokens")
            batches = step_batches([torch.randint(8192, (length,)) for _ in range(tokens // length)])
            kinds = ["packed", "ceiling", *(["native"] if tokens <= most_native else [])]
            seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
            for _ in range(rounds):
                for kind in kinds:
                    seconds[kind].append(timed_step(model, batches[kind], patched=kind == "packed"))
            medians = {kind: statistics.median(times[1:] or times) for kind, times in seconds.items()}  # one warms up
            rows.append({"tokens": tokens, "seconds": seconds, "medians": medians})
            bar.advance(task, tokens)
    fits = {
        kind: fit([row for row in rows if kind in row["medians"]], kind) for kind in ("packed", "ceiling", "native")
    }
    save("scaling", {"length": length, "rows": rows, "fits": fits}, picture(rows))


def fit(rows: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """Fits seconds = fixed + per_token * tokens; returns also how well it fits, and the exponent of a power law."""
    tokens, seconds = np.array([(row["tokens"], row["medians"][kind]) for row in rows]).T
    per_token, fixed = np.polyfit(tokens, seconds, 1)
    left = seconds - (fixed + per_token * tokens)
    exponent, _ = np.polyfit(np.log(tokens), np.log(seconds), 1)
    r_squared = 1 - (left @ left) / ((seconds - seconds.mean()) @ (seconds - seconds.mean()))
    return {"fixed": float(fixed), "per_token": float(per_token), "r_squared": r_squared, "exponent": float(exponent)}


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Draws seconds and seconds per token, both axes logarithmic."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    whole, each = figure.subplots(1, 2)
    for kind in ("ceiling", "packed", "native"):
        points = [(row["tokens"], row["medians"][kind]) for row in rows if kind in row["medians"]]
        tokens, seconds = zip(*points)
        style = {"color": COLOURS[kind], "marker": "o", "label": NAMES[kind]}
        whole.loglog(tokens, seconds, base=2, **style)
        each.semilogx(tokens, [1e3 * s / t for t, s in points], base=2, **style)
    whole.set(xlabel="tokens in the row", ylabel="seconds per step")
    each.set(xlabel="tokens in the row", ylabel="milliseconds per token", ylim=(0, None))
    whole.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
