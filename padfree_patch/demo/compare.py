"""Trains the same batches padded and padding-free, and writes what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

from ..errors import PadfreeError
from ..foreign import explained
from ..measure.texts import read_texts, shuffled, tokenise, train_tokenizer
from . import start
from .job import MODEL_RATE, SMALL_MODEL_RATE, Job, Message
from .launch import WorkerFailed, run_worker
from .results import Comparison, Run

__all__ = ["Settings", "WorkerFailed", "compare", "save", "show", "whole_file"]

SAMPLE = Path(__file__).with_name("instructions.jsonl")
SMALL_MODEL = "small random Llama"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command's options say."""

    model: str | None
    """Folder or name; None for a small random Llama."""
    data_file: Path | None
    """JSON lines; None for the bundled instructions."""
    steps: int
    batch_size: int
    max_length: int
    layers: int | None
    """So many of the model's first layers are kept; None for all."""
    learning_rate: float | None
    """None for `MODEL_RATE`, or `SMALL_MODEL_RATE` without a model."""
    threads: int
    seed: int
    output: Path

    def job(self, scratch: str) -> Job:
        """Makes the padded run's job."""
        default_rate = MODEL_RATE if self.model else SMALL_MODEL_RATE
        return Job(
            padding_free=False,
            model=self.model or os.path.join(scratch, "model"),
            layers=self.layers,
            examples=os.path.join(scratch, "examples.json"),
            batch_size=self.batch_size,
            learning_rate=default_rate if self.learning_rate is None else self.learning_rate,
            threads=self.threads,
            scratch=scratch,
        )

    def shown(self, job: Job) -> dict[str, object]:
        """Gives what the results say of how they were made."""
        return {
            "model": Path(self.model).name if self.model else SMALL_MODEL,
            "data": self.data_file.name if self.data_file else "bundled instructions",
            "max_length": self.max_length,
            "steps": self.steps,
            "seed": self.seed,
            **{key: getattr(job, key) for key in ("batch_size", "layers", "learning_rate", "threads")},
            **{package: version(package) for package in ("torch", "transformers", "accelerate")},
        }


def compare(settings: Settings) -> Comparison:
    """Makes both runs.

    Raises PadfreeError if something that was given cannot be used, WorkerFailed if a run stops.
    """
    texts = read_texts(settings.data_file or SAMPLE)
    make_folder(settings.output)
    model = settings.model
    with tempfile.TemporaryDirectory() as scratch:
        job = settings.job(scratch)
        with explained(f"--model {model!r} cannot be used" if model else "the small model cannot be made"):
            prepare(job, texts, settings)
        padded, padding_free = run_both(job, steps=settings.steps, output=settings.output)
    return Comparison(settings.shown(job), padded, padding_free)


def save(comparison: Comparison, output: Path) -> None:
    """Writes results and picture.

    Raises OSError if that fails; then no half file is left.
    """
    from .picture import save_picture

    with whole_file(output / "results.json") as file:
        file.write_text(comparison.as_text())
    with whole_file(output / "comparison.png") as file:
        save_picture(comparison, file)


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


def prepare(job: Job, texts: list[str], settings: Settings) -> None:
    """Writes the examples in training order, and the small model if none was given, to the places that `job` names."""
    import transformers

    if settings.model is None:
        tokenizer = train_tokenizer(texts, vocab_size=start.VOCABULARY)
        start.make_small_llama(Path(job.model), tokenizer, seed=settings.seed)
    else:
        start.check_language_model(settings.model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    config = start.load_config(job.model, layers=job.layers)
    positions, max_length = getattr(config, "max_position_embeddings", None), settings.max_length
    if positions is not None and max_length > positions:
        raise PadfreeError(
            f"--max-length {max_length}: the model has {positions} positions; pass --max-length {positions}"
        )
    chosen = shuffled(texts, count=settings.steps * settings.batch_size, seed=settings.seed)
    examples = tokenise(chosen, tokenizer, max_length=max_length)
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


def show(comparison: Comparison, output: Path) -> None:
    """Prints the results as tables."""
    from rich.console import Console

    from .report import print_report

    console = Console()
    print_report(comparison, console)
    console.print(f"\nwritten to {output}{os.sep}: results.json, comparison.png, padded.log, padding-free.log")
