"""A run that is not packed is stopped by an error that names what keeps it from being packed."""

from __future__ import annotations

import pytest
import torch

from helpers.training import data, padding, trainer_of
from padfree_patch import DataCollatorWithFlattening, PaddingFreeCallback, PadfreeError, apply

pytestmark = pytest.mark.versions

STOPPED = "3 training steps, and no row held a second sequence: this run is not packed"


def cause(trainer):
    """What the error says was seen, without what to do."""
    trainer.add_callback(PaddingFreeCallback(patience=3))
    with pytest.raises(PadfreeError, match=STOPPED) as error:
        trainer.train()
    found = str(error.value).splitlines()
    assert found[-1] == "PaddingFreeCallback(patience=0) lets it run"
    return [line.strip() for line in found[1:-1]]


def full_rows(features):
    ids = torch.tensor([each["input_ids"] for each in features])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def full(rows=12):
    return [{"input_ids": list(range(3, 15))}] * rows


def test_padding_is_named(llama, tmp_path):
    (found,) = cause(trainer_of(apply(llama), tmp_path, padding, max_steps=6))
    assert found.startswith("the batches are padded: use a data_collator that flattens")
    assert found.endswith("instead of padding")


def test_batch_size_is_named(llama, tmp_path):
    options = {"per_device_train_batch_size": 1, "max_steps": 6}
    (found,) = cause(trainer_of(apply(llama), tmp_path, DataCollatorWithFlattening(), **options))
    assert found.startswith("the batch size is 1") and "raise per_device_train_batch_size" in found


@pytest.mark.parametrize("batch_size", [1, 2])
def test_full_rows_without_boundaries_are_named(llama, tmp_path, batch_size):
    options = {"per_device_train_batch_size": batch_size, "max_steps": 6, "dataset": full()}
    *others, found = cause(trainer_of(apply(llama), tmp_path, full_rows, **options))
    assert found.startswith("the rows are full, and nothing says where examples end")
    assert len(others) == (batch_size == 1)


def test_columns_that_the_trainer_dropped_are_named(llama, tmp_path):
    """As of TRL's pack_dataset, whose seq_lengths no forward names."""
    import datasets

    full = [{**each, "attention_mask": [1] * len(each["input_ids"])} for each in data()]
    rows = datasets.Dataset.from_list([{**each, "seq_lengths": [len(each["input_ids"])]} for each in full])
    trainer = trainer_of(apply(llama), tmp_path, DataCollatorWithFlattening(), dataset=rows, max_steps=6)
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = 1
    first, *_ = cause(trainer)
    assert first.startswith("the Trainer removed seq_lengths, which say where the examples of a row end")
    assert "pass remove_unused_columns=False" in first


def test_a_collator_without_positions_is_named(llama, tmp_path):
    collator = DataCollatorWithFlattening(return_position_ids=False)
    (found,) = cause(trainer_of(apply(llama), tmp_path, collator, max_steps=6))
    assert "4 examples come as one row that does not say where they end: DataCollatorWithFlattening" in found


def test_a_replaced_forward_is_named(llama, tmp_path):
    apply(llama)
    upstream = type(llama).forward

    def fast_forward(input_ids, labels=None, attention_mask=None, position_ids=None):
        return upstream(llama, input_ids=input_ids, labels=labels)

    llama.forward = fast_forward
    collator = DataCollatorWithFlattening(return_position_ids=False)
    first, *_ = cause(trainer_of(llama, tmp_path, collator, max_steps=6))
    assert "LlamaForCausalLM.forward was replaced on the instance by" in first and "fast_forward" in first


def test_a_loss_that_calls_something_else_is_named(llama, tmp_path):
    trainer = trainer_of(apply(llama), tmp_path, DataCollatorWithFlattening(), max_steps=6)
    trainer.compute_loss = lambda model, inputs, *args, **kwargs: model.forward(**inputs).loss
    (found,) = cause(trainer)
    assert found.startswith("no training batch came to LlamaForCausalLM by a call of it: the Trainer's compute_loss")


def test_a_run_that_may_go_on_does(llama, tmp_path):
    """The control."""
    trainer = trainer_of(apply(llama), tmp_path, padding, max_steps=6)
    trainer.add_callback(PaddingFreeCallback(patience=0))
    trainer.train()
    (log, *_) = (each for each in trainer.state.log_history if "loss" in each)
    assert log["sequences_per_row"] == 1 and log["padding_saved"] > 0
