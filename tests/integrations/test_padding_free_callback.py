"""What the callback logs is what the batches held, and a run that is not packed does not go unnoticed."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from padfree_patch import (
    DataCollatorWithFlattening,
    PaddingFreeCallback,
    PadfreeError,
    TokenBudgetBatchSampler,
    apply,
)
from padfree_patch.integrations import figures
from padfree_patch.testing import SyncCounter

pytestmark = pytest.mark.versions


LENGTHS = [5, 9, 2, 12, 7, 7, 3, 4]
FIGURES = {"tokens_per_second", "padding_saved", "sequences_per_row", "longest_row", "peak_memory_gib"}


def trainer_of(model, tmp_path, *, batch_size=4, collator=None, callbacks=(), **options):
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(2, 90, (n,), generator=generator).tolist()} for n in LENGTHS]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=batch_size, report_to=[], logging_steps=1, use_cpu=True, **options
    )
    collator = collator or DataCollatorWithFlattening()
    return Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator, callbacks=list(callbacks))


@pytest.fixture
def patched(llama):
    return apply(llama)


def test_log_says_what_the_batches_held(patched, tmp_path):
    trainer = trainer_of(patched, tmp_path, num_train_epochs=1, callbacks=[PaddingFreeCallback()])
    trainer.train()
    logs = [each for each in trainer.state.log_history if "loss" in each]
    assert len(logs) == 2
    assert all(set(each) >= FIGURES for each in logs)
    assert all(each["sequences_per_row"] == 4 for each in logs)
    assert sum(each["longest_row"] for each in logs) == sum(LENGTHS)
    rows = [each["longest_row"] for each in logs]
    longest = [row / (1 - each["padding_saved"]) / 4 for row, each in zip(rows, logs)]
    assert max(longest) == pytest.approx(12, abs=0.01)  # the longest example is in one of the two batches
    assert all(each["tokens_per_second"] > 0 and each["peak_memory_gib"] > 0.1 for each in logs)


class Tracker(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.mark.parametrize("how", ["callbacks", "add_callback", "attach"])
def test_trackers_before_it_are_told_too(patched, tmp_path, how):
    """The Trainer's own trackers come first."""
    tracker, ours = Tracker(), PaddingFreeCallback()
    trainer = trainer_of(patched, tmp_path, num_train_epochs=1, callbacks=[tracker] + [ours] * (how == "callbacks"))
    if how != "callbacks":
        ours.attach(trainer) if how == "attach" else trainer.add_callback(ours)
    trainer.train()
    assert [set(each) >= FIGURES for each in tracker.seen if "loss" in each] == [True] * 2
    assert trainer.callback_handler.callbacks.count(ours) == 1


@pytest.mark.parametrize("padded", [False, True])
def test_watching_costs_no_sync(llama, padded):
    patched = llama if padded else apply(llama)
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": [1, 2]}, {"input_ids": [3]}])
    if padded:  # unpatched upstream reads its mask; what matters is that watching adds nothing
        batch = {"input_ids": torch.tensor([[1, 2], [3, 0]]), "attention_mask": torch.tensor([[1, 1], [1, 0]]) > 0}
    llama.train()
    with SyncCounter() as before:
        llama(**batch)
    callback = PaddingFreeCallback()
    callback.on_train_begin(None, None, None, model=patched)
    with SyncCounter() as syncs:
        patched(**batch)
    assert syncs.total == before.total and (padded or syncs.total == 0)
    callback.on_train_end(None, None, None)
    assert not patched._forward_pre_hooks


def test_padding_to_a_multiple_is_no_second_sequence(patched, tmp_path):
    collator = DataCollatorWithFlattening(pad_to_multiple_of=16)
    options = {"batch_size": 1, "collator": collator, "max_steps": 6}
    trainer = trainer_of(patched, tmp_path, callbacks=[PaddingFreeCallback(patience=3)], **options)
    with pytest.raises(PadfreeError, match="3 training steps, and no row held a second sequence"):
        trainer.train()
    trainer = trainer_of(
        patched, tmp_path, callbacks=[PaddingFreeCallback()], collator=collator, num_train_epochs=1, batch_size=8
    )
    trainer.train()
    (log,) = (each for each in trainer.state.log_history if "loss" in each)
    assert log["sequences_per_row"] == 8 and log["longest_row"] == 64
    assert log["padding_saved"] == pytest.approx(1 - sum(LENGTHS) / (8 * 12), abs=1e-4)


def test_evaluations_are_no_training_time(patched, tmp_path):
    class Slow(TrainerCallback):
        def on_prediction_step(self, *args, **kwargs):
            time.sleep(0.3)

    trainer = trainer_of(patched, tmp_path, num_train_epochs=2, callbacks=[PaddingFreeCallback(), Slow()])
    trainer.eval_dataset = {"one": trainer.train_dataset[:2], "two": trainer.train_dataset[2:4]}

    class Evaluate(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = True

    trainer.add_callback(Evaluate())
    trainer.train()
    logs = trainer.state.log_history
    assert not any("tokens_per_second" in each for each in logs if "eval_loss" in each)
    speeds = [each["tokens_per_second"] for each in logs if "loss" in each]
    assert len(speeds) == 4 and min(speeds) > 41  # a row has 24 tokens, and its evaluations take 0.6 seconds


def test_examples_without_labels_are_no_padding(patched, tmp_path):
    """The last example of every row is all prompt."""

    def collator(features):
        features = [
            {**each, "labels": [-100] * len(each["input_ids"]) if i else each["input_ids"]}
            for i, each in enumerate(features)
        ]
        return DataCollatorWithFlattening()(features)

    options = {"batch_size": 2, "collator": collator, "max_steps": 4}
    trainer = trainer_of(patched, tmp_path, callbacks=[PaddingFreeCallback(patience=3)], **options)
    trainer.train()
    assert all(each["sequences_per_row"] == 2 for each in trainer.state.log_history if "loss" in each)


def test_padding_that_a_mask_shows_is_no_sequence(patched):
    callback = PaddingFreeCallback()
    callback.on_train_begin(None, None, None, model=patched.train())
    mask, positions = torch.tensor([[1, 1, 1, 1, 1, 0, 0]]), torch.tensor([[0, 1, 0, 1, 2, 0, 0]])
    patched(input_ids=positions + 5, position_ids=positions, attention_mask=mask)
    arguments, logs = TrainingArguments("out", use_cpu=True, report_to=[]), {"loss": 1.0, "learning_rate": 0.1}
    callback.on_log(arguments, TrainerState(), None, logs=logs)
    assert logs["sequences_per_row"] == 2 and logs["tokens_per_second"] > 0
    callback.on_train_end(None, None, None)


def test_a_model_that_is_patched_during_or_after_the_run_is_patched(llama):
    batch = DataCollatorWithFlattening()([{"input_ids": [1, 2]}, {"input_ids": [3]}])
    callback = PaddingFreeCallback()
    callback.on_train_begin(None, None, None, model=llama.train())
    with pytest.raises(PadfreeError, match="not patched"):
        llama(**batch)
    assert not llama._forward_pre_hooks
    callback.on_train_begin(None, None, None, model=llama)
    apply(llama)(**batch)  # the hook is still there
    callback.on_train_end(None, None, None)


def test_all_processes_must_have_the_callback(llama, monkeypatch):
    """Both ranks of a run, which take turns here: the sums of rank 0 alone would wait for ever."""
    store, rank = dist.HashStore(), 0
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(figures, "MOST_SECONDS", 0.1)
    with pytest.raises(
        PadfreeError, match=r"over all 2 processes, but only 1 began the training with one within 0\.1 s"
    ):
        PaddingFreeCallback().on_train_begin(None, None, None, model=llama)
    assert not llama._forward_pre_hooks
    rank = 1
    PaddingFreeCallback().on_train_begin(None, None, None, model=llama)  # the control
    with pytest.raises(PadfreeError, match="only 1 began"):
        PaddingFreeCallback().on_train_begin(None, None, None, model=llama)  # rank 1 alone, in the next training
    with pytest.raises(PadfreeError, match="with the same patience"):
        PaddingFreeCallback(patience=3).on_train_begin(None, None, None, model=llama)


def test_packed_rows_for_an_unpatched_model_are_an_error(llama, tmp_path):
    trainer = trainer_of(llama, tmp_path, callbacks=[PaddingFreeCallback()])
    with pytest.raises(PadfreeError, match=r"given packed rows, but it is not patched; call padfree_patch.apply"):
        trainer.train()


def test_virtual_tokens_after_apply_are_an_error(patched, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    trainer = trainer_of(peft.get_peft_model(patched, config), tmp_path, callbacks=[PaddingFreeCallback()])
    with pytest.raises(PadfreeError, match="virtual tokens"):
        trainer.train()


def test_a_sampler_of_ours_is_told_the_epoch(patched, tmp_path):
    sampler = TokenBudgetBatchSampler(LENGTHS, max_tokens=20)
    trainer = trainer_of(patched, tmp_path, num_train_epochs=3, callbacks=[PaddingFreeCallback()])
    loader = DataLoader(trainer.train_dataset, batch_sampler=sampler, collate_fn=trainer.data_collator)
    trainer.get_train_dataloader = lambda: loader
    trainer.train()
    assert sampler.state_dict()["epoch"] == 2
