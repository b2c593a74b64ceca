"""transformers' Trainer, padded and padding-free on the same examples: the same losses, gradients and weights."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers.comparison import assert_same_training
from helpers.training import LENGTHS, Stream, data, flattening, padding, trained, trainer_of
from padfree_patch import DataCollatorForCompletionOnlyLM, PadfreeError, apply, pack_dataset

pytestmark = pytest.mark.versions


@pytest.mark.parametrize("lengths_given", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_the_padded_one(llama, tmp_path, measured, accumulate, lengths_given):
    options = {"gradient_accumulation_steps": accumulate}
    padded = trained(llama, tmp_path, padding, patched=False, **options)
    collator = flattening(return_flash_attn_kwargs=lengths_given)
    packed = trained(llama, tmp_path, collator, patched=True, **options)
    claim = f"Trainer, {accumulate} batches per step{', lengths given' * lengths_given}"
    assert_same_training(packed, padded, llama.parameters(), measured, claim, library="accelerate")


def test_naive_packing_trains_something_else(llama, tmp_path):
    """The control."""
    padded = trained(llama, tmp_path, padding, patched=False)
    naive = trained(llama, tmp_path, flattening(return_position_ids=False), patched=False)
    moved = sum((a - b).norm() for a, b in zip(padded.weights, llama.parameters()))
    assert sum((a - b).norm() for a, b in zip(naive.weights, padded.weights)) > 0.05 * moved


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_packed_data_set_trains_like_its_examples(llama, tmp_path, measured, remove_unused_columns):
    """Packed rows keep their boundaries through the Trainer, whatever it does with columns."""
    import datasets

    packed = pack_dataset(datasets.Dataset.from_list(data()), 24)
    rows = [[data_row for data_row in row["input_ids"]] for row in packed]
    lengths = [row["seq_lengths"] for row in packed]
    examples = []
    for row, of_row in zip(rows, lengths):
        ends = torch.tensor(of_row).cumsum(0).tolist()
        examples.append([row[end - n : end] for end, n in zip(ends, of_row)])

    def padding_each(features):
        """The examples of the same rows, padded."""
        texts = [example for each in features for example in by_row[tuple(each["input_ids"])]]
        return padding([{"input_ids": text} for text in texts])

    by_row = {tuple(row): of_row for row, of_row in zip(rows, examples)}
    options = {"per_device_train_batch_size": 2, "remove_unused_columns": remove_unused_columns, "dataset": packed}
    padded = trained(llama, tmp_path, padding_each, patched=False, **options)
    found = trained(llama, tmp_path, flattening(), patched=True, **options)
    claim = f"Trainer on pack_dataset's rows, remove_unused_columns={remove_unused_columns}"
    assert_same_training(found, padded, llama.parameters(), measured, claim, library="datasets")
    assert sum((row["position_ids"][0] == 0) for row in packed) == len(packed) < len(LENGTHS)


@pytest.mark.parametrize("wrapped", ["names neither", "peft"])
def test_packed_data_set_keeps_its_boundaries_whatever_forward_names(llama, tmp_path, wrapped):
    """The Trainer removes every column that the forward which it asks does not name."""
    import datasets

    packed = pack_dataset(datasets.Dataset.from_list(data()), 24)
    options = {"dataset": packed, "per_device_train_batch_size": 2, "max_steps": 1}
    expected = trained(llama, tmp_path, flattening(), patched=True, **options)

    class OnlyTokens(type(llama)):
        def forward(self, input_ids=None, labels=None, **kwargs):
            return super().forward(input_ids=input_ids, labels=labels, **kwargs)

    if wrapped == "peft":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(apply(llama), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    else:
        llama.__class__ = OnlyTokens
        model = llama
    found = trained(model, tmp_path, flattening(), patched=True, **options)
    assert found.losses == pytest.approx(expected.losses, abs=1e-5)

    def one_text(features):
        """The control: the same rows without their boundaries."""
        return flattening()([{"input_ids": each["input_ids"]} for each in features])

    mixed = trained(model, tmp_path, one_text, patched=True, **options)
    assert abs(mixed.losses[0] - expected.losses[0]) > 1e-3


@pytest.mark.parametrize("later", ["as it is", "saved", "iterable"])
def test_packed_data_set_keeps_its_boundaries_for_a_forward_that_takes_none(llama, tmp_path, later):
    """A module of one's own around a patched model, of which the Trainer sees nothing but its own forward."""
    import datasets

    class Around(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids=None, labels=None, **kwargs):
            return self.model(input_ids=input_ids, labels=labels, **kwargs)

    def losses(dataset, **options):
        trainer = trainer_of(
            Around(copy.deepcopy(llama)), tmp_path, flattening(), dataset=dataset, max_steps=1, **options
        )
        trainer.train()
        return [each["loss"] for each in trainer.state.log_history if "loss" in each]

    packed = pack_dataset(datasets.Dataset.from_list(data()), 24)
    apply(llama)
    expected = losses(packed, remove_unused_columns=False)
    if later == "saved":
        packed.save_to_disk(str(tmp_path / "rows"))
        packed = datasets.load_from_disk(str(tmp_path / "rows"))
    found = losses(packed.to_iterable_dataset() if later == "iterable" else packed)
    if later == "iterable":  # in their order
        expected = losses(packed.to_iterable_dataset(), remove_unused_columns=False)
    assert found == pytest.approx(expected, abs=1e-5)
    mixed = losses(
        packed.remove_columns("label_ids")
        if later == "saved"
        else datasets.Dataset.from_dict({"input_ids": packed["input_ids"]})
    )
    assert abs(mixed[0] - expected[0]) > 1e-3  # the control


def test_training_on_completions_only_is_the_padded_one(llama, tmp_path, measured):
    texts = [{"input_ids": [*each["input_ids"][:1], 85, 86, *each["input_ids"][1:], 1]} for each in data()]

    def answers_only(features):
        return padding([{**each, "labels": [-100] * 3 + each["input_ids"][3:]} for each in features])

    collator = DataCollatorForCompletionOnlyLM([85, 86], padding_free=True)
    padded = trained(llama, tmp_path, answers_only, patched=False, dataset=texts)
    packed = trained(llama, tmp_path, collator, patched=True, dataset=texts)
    assert_same_training(packed, padded, llama.parameters(), measured, "Trainer, completions only")


def test_stream_trains_like_padded(llama, tmp_path, measured):
    """With accelerate's default for streams, which deals batches out even in one process."""
    padded = trained(llama, tmp_path, padding, patched=False, dataset=Stream())
    packed = trained(llama, tmp_path, flattening(), patched=True, dataset=Stream())
    # Dealt out, the last batch counts in the evaluation as often as it has rows: docs/training.md.
    packed, padded = (each._replace(evaluation=None) for each in (packed, padded))
    assert_same_training(packed, padded, llama.parameters(), measured, "Trainer, IterableDataset", library="accelerate")


def test_lengths_that_a_loader_cut_are_refused(llama, tmp_path):
    trainer = trainer_of(apply(llama), tmp_path, flattening(return_flash_attn_kwargs=True), dataset=Stream())
    ours = r"cu_seq_lens_q has a single value: a loader cut it.*dispatch_batches"
    accelerates = "Can only concatenate tensors"  # before it had a case for one process
    with pytest.raises((PadfreeError, TypeError), match=f"{ours}|{accelerates}"):
        trainer.train()
