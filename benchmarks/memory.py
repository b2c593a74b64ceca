"""Peak memory of training steps on real text, padded and padding-free, every measurement in a process of its own.

    .venv/bin/nox -s benchmark -- memory --model DIR --data FILE --data FILE

DIR is SmolLM2-135M as benchmarks/get_smollm2.py makes it. Batches whose padded form would not fit into 24 GB are left
out for both. The peak is the whole process's: interpreter, libraries, weights, gradients.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from common import COLOURS, LARGEST_PADDED, NAMES, REAL, SMALL, batches_from, fold, load, progress, save
from matplotlib.figure import Figure
from transformers import AutoTokenizer

from padfree_patch.measure.memory import peak_bytes, reset_peak, resident_bytes
from padfree_patch.measure.step import timed_step

KINDS = ("padded", "packed")


@click.command()
@click.option("--model", "folder", required=True, help="Folder of SmolLM2-135M.")
@click.option("--data", "files", multiple=True, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--batch-size", default=8, show_default=True)
@click.option("--steps", default=5, show_default=True)
@click.option("--processes", default=3, show_default=True, help="Of each kind, 4 layers: allocators differ a bit.")
@click.option("--real-processes", default=1, show_default=True, help="The same for the real weights.")
@click.option("--max-length", default=2048, show_default=True)
@click.option("--here", type=(str, str), hidden=True, help="Model and kind to measure in this process.")
def main(
    folder: str,
    files: tuple[Path, ...],
    batch_size: int,
    steps: int,
    processes: int,
    real_processes: int,
    max_length: int,
    here: tuple[str, str] | None,
) -> None:
    """Measure and write."""
    if here:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        drawn = batches_from(files[0], tokenizer, batch_size=batch_size, count=4 * steps, max_length=max_length)
        fitting = (each for each in drawn if len(each) * max(map(len, each)) <= LARGEST_PADDED[here[0]])
        print(json.dumps(measured(load(folder, here[0]), here[1], list(itertools.islice(fitting, steps)))))
        return
    found = []
    settings = ["--batch-size", str(batch_size), "--steps", str(steps), "--max-length", str(max_length)]
    with progress() as bar:
        counts = {SMALL: processes, REAL: real_processes}
        cases = [
            (model, file, kind)
            for model, count in counts.items()
            for file, _, kind in itertools.product(files, range(count), KINDS)
        ]
        for model, file, kind in bar.track(cases, description="a process each"):
            options = ["--model", folder, "--data", str(file), "--here", model, kind, *settings]
            output = subprocess.run([sys.executable, __file__, *options], check=True, capture_output=True, text=True)
            data = file.name.split(".")[0]
            found.append({"model": model, "data": data, "kind": kind, **json.loads(output.stdout.splitlines()[-1])})
    save("memory", {"batch_size": batch_size, "steps": steps, "found": found}, picture(found))


def measured(model: Any, kind: str, batches: list[Any]) -> dict[str, Any]:
    """Measures the peak of this process over steps on some batches, and what it held before."""
    before = resident_bytes()
    reset_peak()
    for examples in batches:
        timed_step(model, fold(model, examples)[kind], patched=kind == "packed")
    lengths = [[len(ids) for ids in examples] for examples in batches]
    return {"held_bytes": before, "peak_bytes": peak_bytes(), "lengths": lengths}


def picture(found: list[dict[str, Any]]) -> Figure:
    """Draws the median peak of every case."""
    cases = list(dict.fromkeys((each["model"], each["data"]) for each in found))
    figure = Figure(figsize=(6.5, 3), layout="constrained")
    axes = figure.subplots()
    for offset, kind in ((-0.2, "padded"), (0.2, "packed")):
        of_cases = [[e["peak_bytes"] for e in found if (e["model"], e["data"], e["kind"]) == (*c, kind)] for c in cases]
        peaks = [statistics.median(peaks) / 2**30 for peaks in of_cases]
        axes.bar([i + offset for i in range(len(cases))], peaks, 0.36, color=COLOURS[kind], label=NAMES[kind])
    axes.set_xticks(range(len(cases)), ["\n".join(case) for case in cases])
    axes.set_ylabel("GiB at the peak")
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
