"""compute_metrics on packed rows gets what it gets of padded batches: a row for each example."""

from __future__ import annotations

import copy

import datasets
import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from helpers.training import data, padding
from padfree_patch import (
    DataCollatorWithFlattening,
    PadfreeError,
    PerExampleMetrics,
    apply,
    pack_dataset,
)
from padfree_patch.integrations import per_example

pytestmark = pytest.mark.versions


class PerExampleTrainer(PerExampleMetrics, Trainer):
    pass


def predicted(model, folder, collator, rows, *, trainer=PerExampleTrainer, batch_size=8, **options):
    """Logits and labels, as compute_metrics is given them."""
    found = []
    arguments = TrainingArguments(
        str(folder), per_device_eval_batch_size=batch_size, report_to=[], use_cpu=True, label_names=["labels"]
    )
    made = trainer(
        model=model,
        args=arguments,
        eval_dataset=rows,
        data_collator=collator,
        compute_metrics=lambda each: found.append((each.predictions, each.label_ids)) or {},
        **options,
    )
    made.evaluate()
    return found[0]


def first_ignored(labels):
    """Sets the first labels, which nothing predicts, as our collators do."""
    return np.concatenate([np.full_like(labels[:, :1], -100), labels[:, 1:]], 1)


def test_metrics_get_what_they_get_of_padded_batches(llama, tmp_path):
    padded, labels = predicted(copy.deepcopy(llama), tmp_path, padding, data(), trainer=Trainer)
    model = apply(llama)
    for collator in (DataCollatorWithFlattening(), DataCollatorWithFlattening(pad_to_multiple_of=8)):
        packed, packed_labels = predicted(model, tmp_path, collator, data())
        np.testing.assert_array_equal(packed_labels, first_ignored(labels))
        real = labels != -100
        assert np.abs(packed - padded)[real].max() < 2e-5 * np.abs(padded[real]).max()
    untouched, _ = predicted(model, tmp_path, padding, data())  # padded batches are the Trainer's own
    np.testing.assert_allclose(untouched[real], padded[real], atol=1e-5)
    rows, _ = predicted(model, tmp_path, DataCollatorWithFlattening(), data(), trainer=Trainer)  # the control
    assert len(rows) < len(packed)


def test_rows_of_several_examples_lose_none(llama, tmp_path):
    rows = pack_dataset(datasets.Dataset.from_list(data()), max_length=32)
    assert len(rows) % 4  # or accelerate would have nothing to cut
    found = predicted(apply(llama), tmp_path, DataCollatorWithFlattening(), rows, batch_size=4)
    expected = sorted(tuple(each["input_ids"][1:]) for each in data())
    assert sorted(tuple(row[row != -100]) for row in found[1]) == expected


def test_logits_are_preprocessed_for_each_example(llama, tmp_path):
    shapes = []

    def likeliest(logits, labels):
        shapes.append((logits.shape[:2], labels.shape))
        return logits.argmax(-1)

    predictions, labels = predicted(
        apply(llama), tmp_path, DataCollatorWithFlattening(), data(), preprocess_logits_for_metrics=likeliest
    )
    assert predictions.shape == labels.shape and len(labels) == len(data())
    assert all(logits == labels for logits, labels in shapes)


@pytest.mark.parametrize(("examples", "others"), [(9, 9.0), (3, 4.0)], ids=["rows of several", "unequal"])
def test_several_processes_say_what_they_cannot_count(llama, tmp_path, monkeypatch, examples, others):
    trainer = PerExampleTrainer(model=llama, args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    monkeypatch.setattr(
        per_example, "of_all_processes", lambda *_, **__: [max(examples, others), -min(examples, others)]
    )
    row = {"input_ids": torch.ones(1, examples, dtype=torch.int64), "position_ids": torch.zeros(1, examples).long()}
    monkeypatch.setattr(Trainer, "prediction_step", lambda *_, **__: (None, torch.ones(1, examples, 2), None))
    with pytest.raises(PadfreeError, match="evaluate examples one by one, not rows of pack_dataset, or on one process"):
        trainer.prediction_step(llama, row, False)
