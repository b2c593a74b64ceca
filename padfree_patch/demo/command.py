"""The `demo` command: trains the same batches padded and padding-free, and shows what came of it."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from ..errors import PadfreeError
from ..foreign import check_there
from .job import MODEL_RATE, SMALL_MODEL_RATE

NEEDED = ("accelerate", "matplotlib", "rich")


@click.command()
@click.option("--model", help="Folder or name of a causal language model.  [default: a small random Llama]")
@click.option(
    "--data",
    "data_file",
    type=Path,
    help="JSON lines with prompt and completion, plain or .gz.  [default: the bundled instructions]",
)
@click.option("--steps", type=click.IntRange(min=2), default=30, show_default=True, help="Of each run.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Examples per step.")
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    default=2048,
    show_default=True,
    help="Longest example, in tokens.",
)
@click.option("--layers", type=click.IntRange(min=1), help="Keep only the first so many layers of --model.")
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, max=1),
    help=f"Of AdamW, constant.  [default: {SMALL_MODEL_RATE:g}, with --model {MODEL_RATE:g}]",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=min(2, os.cpu_count() or 1),
    show_default=True,
    help="Of each run, which has the CPU to itself.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**32 - 1),
    default=0,
    show_default=True,
    help="Of the order of examples and the random model.",
)
@click.option(
    "--output",
    type=Path,
    default=Path("padfree_demo"),
    show_default=True,
    help="Folder for results.json, comparison.png and the logs of both runs.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON object instead of tables.")
def demo(as_json: bool, **options: Any) -> None:
    """Fine-tune a model padded and padding-free, and compare.

    Both runs are given the same batches. The padded run is what one does without this package: batches filled up with
    pads, the model as it is. The padding-free run packs each batch into one row after padfree_patch.apply(model). Both
    start from the same weights and train on all tokens with transformers' Trainer in float32 on the CPU, each in a
    process of its own. Exit code 1 if their losses differ by more than 1e-4 at any step or a run stops, 2 if something
    given cannot be used.
    """
    if missing := [package for package in NEEDED if find_spec(package) is None]:
        raise click.ClickException(f"the demo needs {' and '.join(missing)}: pip install 'padfree_patch[demo]'")
    model, output = options["model"], options["output"]
    try:
        if model is not None:
            check_there(model, f"--model {model!r} cannot be used")
        from . import compare  # which imports torch: not for --help

        comparison = compare.compare(compare.Settings(**options))
    except PadfreeError as error:
        raise Unusable(str(error)) from error
    except (OSError, compare.WorkerFailed) as error:
        raise click.ClickException(str(error)) from error
    try:
        compare.save(comparison, output)
    except OSError as error:
        click.echo(comparison.as_text())  # an hour's work, perhaps
        raise Unusable(f"the results cannot be written to {output}: {error}; they are printed instead") from error
    if as_json:
        click.echo(comparison.as_text())
    else:
        compare.show(comparison, output)
    if problems := comparison.problems():
        raise click.ClickException("\n".join(problems))


class Unusable(click.ClickException):
    """Something that was given cannot be used."""

    exit_code = 2
