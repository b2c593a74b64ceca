"""The `demo` command: trains the same batches padded and padding-free, and shows what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import click

from ..errors import PadfreeError
from ..foreign import explained
from ..measure.texts import read_texts, shuffled, tokenise, train_tokenizer
from . import start
from .job import Job, Message
from .launch import WorkerFailed, run_worker
from .results import Comparison, Run

NEEDED = ("accelerate", "matplotlib", "rich")
SAMPLE = Path(__file__).with_name("instructions.jsonl")
SMALL_MODEL = "small random Llama"
SMALL_MODEL_RATE, MODEL_RATE = 5e-4, 2e-5
"""Learning rates. Adam amplifies rounding: at 1e-3 the small model's losses come up to 3e-5 apart in 30 steps.

The losses of two padded runs that differ only in the number of pads then come 1e-5 apart. At 5e-4 both distances are
less than 3e-6 (seeds 0, 1, 2).
"""


@click.command()
@click.option("--model", help="Folder or name of a causal language model.  [default: a small random Llama]")
@click.option(
    "--data",
    "data_file",
    type=Path,
    help="JSON lines with prompt and completion, plain or .gz.  [default: the bundled instructions]",
)
@click.option("--steps", type=click.IntRange(min=2), default=30, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
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
    help=f"[default: {SMALL_MODEL_RATE:g}, with --model {MODEL_RATE:g}]",
)
@click.option("--threads", type=click.IntRange(min=1), default=min(2, os.cpu_count() or 1), show_default=True)
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
def demo(
    model: str | None,
    data_file: Path | None,
    steps: int,
    batch_size: int,
    max_length: int,
    layers: int | None,
    learning_rate: float | None,
    threads: int,
    seed: int,
    output: Path,
    as_json: bool,
) -> None:
    """Fine-tune a model twice on the same batches, padded and padding-free, and compare.

    The padded run is what one does without this package: batches filled up with pads, the model as it is. The
    padding-free run packs each batch into one row after padfree_patch.apply(model). Both start from the same weights
    and train on all tokens with transformers' Trainer in float32 on the CPU, each in a process of its own. Exit code 1
    if their losses differ by more than 1e-4 at any step or a run stops, 2 if something given cannot be used.
    """
    if missing := [package for package in NEEDED if find_spec(package) is None]:
        raise click.ClickException(f"the demo needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    from .picture import save_picture

    try:
        texts = read_texts(data_file or SAMPLE)
        make_folder(output)
        with tempfile.TemporaryDirectory() as scratch:
            job = Job(
                padding_free=False,
                model=model or os.path.join(scratch, "model"),
                layers=layers,
                examples=os.path.join(scratch, "examples.json"),
                batch_size=batch_size,
                learning_rate=(MODEL_RATE if model else SMALL_MODEL_RATE) if learning_rate is None else learning_rate,
                threads=threads,
                scratch=scratch,
            )
            with explained(f"--model {model!r} cannot be used" if model else "the small model cannot be made"):
                prepare(job, texts, random_model=not model, count=steps * batch_size, max_length=max_length, seed=seed)
            padded, padding_free = run_both(job, steps=steps, output=output)
    except PadfreeError as error:
        raise Unusable(str(error)) from error
    except (OSError, WorkerFailed) as error:
        raise click.ClickException(str(error)) from error

    settings = {
        "model": Path(model).name if model else SMALL_MODEL,
        "data": data_file.name if data_file else "bundled instructions",
        "max_length": max_length,
        "steps": steps,
        "seed": seed,
        **{key: getattr(job, key) for key in ("batch_size", "layers", "learning_rate", "threads")},
        **{package: version(package) for package in ("torch", "transformers", "accelerate")},
    }
    comparison = Comparison(settings, padded, padding_free)
    results = json.dumps(comparison.as_json(), indent=2)
    try:
        with whole_file(output / "results.json") as file:
            file.write_text(results)
        with whole_file(output / "comparison.png") as file:
            save_picture(comparison, file)
    except OSError as error:
        click.echo(results)  # an hour's work, perhaps
        raise Unusable(f"the results cannot be written to {output}: {error}; they are printed instead") from error
    show(comparison, results if as_json else None, output)
    if problems := comparison.problems():
        raise click.ClickException("\n".join(problems))


class Unusable(click.ClickException):
    """Something that was given cannot be used."""

    exit_code = 2


def make_folder(folder: Path) -> None:
    """Makes a folder and tries to write into it.

    Raises PadfreeError if that cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # under a file, not allowed, no space; not a path
        raise PadfreeError(f"--output {str(folder)!r} is no folder that can be written to: {error}") from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which becomes `path` when all is written; if something fails, nothing is left."""
    unfinished = path.with_name(f"unfinished-{path.name}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def prepare(job: Job, texts: list[str], *, random_model: bool, count: int, max_length: int, seed: int) -> None:
    """Writes the examples in training order, and the small model if none was given, to the places that `job` names."""
    import transformers

    if random_model:
        tokenizer = train_tokenizer(texts, vocab_size=start.VOCABULARY)
        start.make_small_llama(Path(job.model), tokenizer, seed=seed)
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    config = start.load_config(job.model, layers=job.layers)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise PadfreeError(
            f"--max-length {max_length}: the model has {positions} positions; pass --max-length {positions}"
        )
    examples = tokenise(shuffled(texts, count=count, seed=seed), tokenizer, max_length=max_length)
    Path(job.examples).write_text(json.dumps(examples))


def run_both(job: Job, *, steps: int, output: Path) -> list[Run]:
    """Makes the padded run, then the padding-free one: at the same time they would slow each other down."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    runs = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars = {name: progress.add_task(name, total=steps, start=False) for name in ("padded", "padding-free")}

        def follow(name: str, message: Message) -> None:
            stage = message.get("stage") or f"training, loss {message['loss']:.4f}"
            progress.update(bars[name], description=f"{name}: {stage}", completed=message.get("step", 0))

        for name, bar in bars.items():
            progress.start_task(bar)
            run_job = dataclasses.replace(job, padding_free=name == "padding-free")
            log = output / f"{name}.log"
            runs.append(run_worker(run_job, name=name, folder=Path(job.scratch), log=log, follow=partial(follow, name)))
    return runs


def show(comparison: Comparison, results: str | None, output: Path) -> None:
    """Prints the results as tables; or only as JSON, if `results` is given."""
    from rich.console import Console

    from .report import print_report

    if results is not None:
        click.echo(results)
        return
    console = Console()
    print_report(comparison, console)
    console.print(f"\nwritten to {output}{os.sep}: results.json, comparison.png, padded.log, padding-free.log")
