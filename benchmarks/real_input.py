"""Runs the demo on a real model and real text; writes docs/real-input.md and the README's table from what it finds.

    .venv/bin/nox -s real_input -- --model DIR --data FILE [--data FILE ...]

Needs an idle machine: padded and padding-free are timed one after the other. `--report-only` writes the pages again
from the results that are there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "real-input"
PAGE = ROOT / "docs" / "real-input.md"
COMMAND = ".venv/bin/nox -s real_input -- --model DIR --data FILE"


@click.command()
@click.option("--model", help="Folder of the model, as benchmarks/get_smollm2.py makes it.")
@click.option("--data", "files", multiple=True, type=click.Path(exists=True, path_type=Path))
@click.option("--batch-size", "batch_sizes", multiple=True, type=int, default=(4, 8), show_default=True)
@click.option("--steps", default=20, show_default=True)
@click.option("--max-length", default=1024, show_default=True, help="Longest example, in tokens.")
@click.option("--report-only", is_flag=True, help="Run nothing.")
def main(
    model: str | None,
    files: tuple[Path, ...],
    batch_sizes: tuple[int, ...],
    steps: int,
    max_length: int,
    report_only: bool,
) -> None:
    """Run the demo on every file and batch size, then write the pages."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    if not report_only:
        if not (model and files):
            raise click.UsageError("--model and --data, or --report-only")
        for file in files:
            for batch_size in batch_sizes:
                run(model, file, batch_size, steps, max_length)
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    PAGE.write_text(page(results))
    readme = ROOT / "README.md"
    readme.write_text(between(readme.read_text(), "real-input", table(results)))


def run(model: str, file: Path, batch_size: int, steps: int, max_length: int) -> None:
    """Runs one demo, and keeps its results and its picture."""
    name = f"{file.name.split('.')[0]}-batch-{batch_size}"
    output = RESULTS / name
    options = {"model": model, "data": file, "batch-size": batch_size, "steps": steps, "max-length": max_length}
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    subprocess.run([sys.executable, "-m", "padfree_patch.demo", *arguments, "--output", str(output)], check=True)
    shutil.move(output / "results.json", RESULTS / f"{name}.json")
    shutil.move(output / "comparison.png", RESULTS / f"{name}.png")
    shutil.rmtree(output)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Returns a table with a row per run."""
    columns = (
        "data",
        "batch",
        "padding",
        "real tokens/s padded",
        "padding-free",
        "speed-up",
        "memory that training adds",
        "largest loss difference",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for result in results.values():
        padded, free, settings = result["padded"], result["padding_free"], result["settings"]
        memory = 1 - free["growth_bytes"] / padded["growth_bytes"]
        speed = f"**{free['tokens_per_second'] / padded['tokens_per_second']:.2f} x**"
        if result["speeds_unreliable"]:
            speed = "crowded"
        lines.append(
            f"| {settings['data'].split('.')[0]} | {settings['batch_size']} | {padded['padding_share']:.0%} "
            f"| {padded['tokens_per_second']:.0f} | {free['tokens_per_second']:.0f} | {speed} "
            f"| {-memory:+.0%} ({padded['growth_bytes'] / 2**30:.1f} to {free['growth_bytes'] / 2**30:.1f} GiB) "
            f"| {result['largest_loss_difference']:.1g} |"
        )
    return "\n".join(lines)


def page(results: dict[str, dict[str, Any]]) -> str:
    """Returns the whole page: settings, table, losses step by step, pictures."""
    first = next(iter(results.values()))["settings"]
    versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "transformers", "accelerate"))
    parts = [
        "# Real input\n",
        f"SmolLM2-135M-Instruct fine-tuned in float32 on {first['threads']} CPU threads, {first['steps']} steps, "
        f"examples cut at {first['max_length']} tokens, all tokens trained on. The same batches run padded (right "
        f"padding, mask, unpatched model) and padding-free. {versions}.\n",
        f"Made by benchmarks/real_input.py, with the model from benchmarks/get_smollm2.py:\n\n"
        f"```bash\n{COMMAND}\n```\n",
        "Real tokens per second never count padding, and leave out the first step, which warms up. Memory is what the "
        "process grows by after the model is loaded. The run fails unless the losses of both runs are equal to 1e-4 at "
        "every step. `crowded` means that other programs used the CPU meanwhile, so the speeds are not reliable.\n",
        table(results) + "\n",
    ]
    for name, result in results.items():
        padded, free = result["padded"], result["padding_free"]
        parts.append(f"## {name}\n\n![losses, speed, memory and padding](real-input/{name}.png)\n")
        parts.append(
            f"Before apply, B's logits move by {padded['probe']['logit_change']:.3g} when A changes, first in "
            f"`{padded['probe']['first_leak']}`; afterwards by {free['probe']['logit_change']:.3g}, and packed logits "
            f"differ from each example's alone by {free['probe']['alone_error']:.2g}. Peak memory "
            f"{padded['peak_bytes'] / 2**30:.2f} and {free['peak_bytes'] / 2**30:.2f} GiB.\n"
        )
        rows = zip(padded["losses"], free["losses"], padded["real_tokens"], padded["row_tokens"])
        lines = [
            "| step | loss padded | loss padding-free | real tokens | tokens with padding |",
            "|---|---|---|---|---|",
        ]
        lines += [f"| {i} | {a:.6f} | {b:.6f} | {real} | {row} |" for i, (a, b, real, row) in enumerate(rows, 1)]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def between(text: str, mark: str, content: str) -> str:
    """Returns `text` with what stands between the two comments of `mark` replaced."""
    begin, end = text.index(f"<!-- {mark}:begin"), text.index(f"<!-- {mark}:end")
    return f"{text[: text.index('-->', begin) + 3]}\n{content}\n{text[end:]}"


if __name__ == "__main__":
    main()
