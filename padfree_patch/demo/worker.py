"""Makes one training run in a process of its own, so that its peak memory is its own.

`python -m padfree_patch.demo.worker JOB.json` writes JSON lines to stdout: `{"stage": ...}`, `{"step": ...}` after each
step, at last `{"run": ...}`. Everything else that is printed goes to stderr.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch.utils.data import DataLoader

from .. import DataCollatorWithFlattening, apply, verify
from ..batch.labels import IGNORED_LABEL
from ..measure import crowding, memory
from . import start
from .job import Job, Message
from .results import Run

Example = dict[str, list[int]]


Report = Callable[[Message], None]


def main() -> None:
    """Runs the job of the file that the command line names, and reports on stdout."""
    # What libraries print goes to stderr; only the lines of the protocol go to the real stdout.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def report(message: Message) -> None:
        print(json.dumps(message), file=channel)

    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    report({"run": dataclasses.asdict(run(job, report))})


def run(job: Job, report: Report) -> Run:
    """Loads the model, patches it if the run is padding-free, verifies and trains it, and returns what was measured."""
    torch.set_num_threads(job.threads)
    report({"stage": "loading"})
    model = start.load_model(job.model, layers=job.layers)
    if job.padding_free:
        report({"stage": "patching"})
        apply(model)
    report({"stage": "probing for leaks"})
    probe = verify(model)

    report({"stage": "training"})
    examples = [{"input_ids": ids, "labels": ids} for ids in json.loads(Path(job.examples).read_text())]
    batches: DataLoader[Example] = DataLoader(
        examples,  # type: ignore[arg-type]  # a list is a dataset too; read in its order, so both runs see the same batches
        batch_size=job.batch_size,
        collate_fn=DataCollatorWithFlattening() if job.padding_free else pad_right,
    )
    trainer = RecordingTrainer(
        model=model, args=training_arguments(job, steps=len(batches)), batches=batches, report=report
    )
    memory.reset_peak()
    loaded_bytes = memory.resident_bytes()
    waited_before = crowding.waited_seconds()
    trainer.train()
    waited = crowding.waited_seconds() - waited_before

    lengths = [len(example["input_ids"]) for example in examples]
    return Run(
        probe=probe,
        losses=trainer.losses,
        real_tokens=[sum(lengths[i : i + job.batch_size]) for i in range(0, len(lengths), job.batch_size)],
        row_tokens=trainer.row_tokens,
        step_seconds=trainer.step_seconds,
        loaded_bytes=loaded_bytes,
        peak_bytes=memory.peak_bytes(),
        waited_share=waited / (job.threads * sum(trainer.step_seconds)),
    )


def pad_right(examples: list[Example]) -> dict[str, torch.Tensor]:
    """Pads every example to the longest of its batch, as one does without this package.

    The first label of an example is ignored, as in a packed row. No token predicts it, but newer Trainers divide the
    loss by the number of labels that are not ignored, and both runs must divide by the same number.
    """
    longest = max(len(example["input_ids"]) for example in examples)

    def filled(rows: list[list[int]], pad: int) -> torch.Tensor:
        return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])

    return {
        "input_ids": filled([example["input_ids"] for example in examples], 0),
        "attention_mask": filled([[1] * len(example["input_ids"]) for example in examples], 0),
        "labels": filled([[IGNORED_LABEL, *example["labels"][1:]] for example in examples], IGNORED_LABEL),
    }


def training_arguments(job: Job, *, steps: int) -> transformers.TrainingArguments:
    on_cpu = "use_cpu" if accepts(transformers.TrainingArguments, "use_cpu") else "no_cuda"
    return transformers.TrainingArguments(
        output_dir=job.scratch,
        max_steps=steps,
        per_device_train_batch_size=job.batch_size,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **{on_cpu: True},
    )


def accepts(function: Callable[..., object], parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters


class RecordingTrainer(transformers.Trainer):
    """A Trainer over given batches that keeps every step's loss unrounded (its own log rounds to 4 digits)."""

    def __init__(self, *, batches: DataLoader[Example], report: Report, **options: object) -> None:
        super().__init__(**options, train_dataset=batches.dataset)
        self.batches = batches
        self.losses: list[float] = []
        self.row_tokens: list[int] = []
        self.step_seconds: list[float] = []
        self.add_callback(StepClock(self, report))

    def get_train_dataloader(self) -> DataLoader[Example]:
        return self.batches

    def training_step(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *rest: object) -> torch.Tensor:
        loss = super().training_step(model, inputs, *rest)
        self.losses.append(loss.item())
        self.row_tokens.append(inputs["input_ids"].numel())
        return loss


class StepClock(transformers.TrainerCallback):
    """Times steps from end to end, so that making the batch counts."""

    def __init__(self, trainer: RecordingTrainer, report: Report) -> None:
        self.trainer = trainer
        self.report = report
        self.since = 0.0

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.since = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        now = time.perf_counter()
        self.trainer.step_seconds.append(now - self.since)
        self.since = now
        self.report({"step": len(self.trainer.losses), "loss": self.trainer.losses[-1]})


if __name__ == "__main__":
    main()
