"""TRL's SFTTrainer with our collators, against the same examples padded: `nox -s trl`, not part of the ordinary tests.

With a collator of ours TRL's own padding_free stays off; with its own, a patched model takes that too.
"""

from __future__ import annotations

import copy
import inspect
import re
from pathlib import Path

import datasets
import pytest
import torch
from trl import SFTConfig, SFTTrainer

import padfree_patch
from helpers.comparison import LEARNING_RATE, Training, assert_same_training
from padfree_patch import (
    DataCollatorForCompletionOnlyLM,
    DataCollatorWithFlattening,
    PaddingFreeCallback,
    apply,
    pack_dataset,
    restore,
)
from padfree_patch.measure.texts import train_tokenizer
from padfree_patch.registry import registry
from padfree_patch.testing import tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
HAS_PADDING_FREE = "padding_free" in inspect.signature(SFTConfig).parameters
LENGTHS = [5, 9, 2, 12, 7, 17, 3, 4, 6, 11, 2, 8, 13, 5, 9, 4]


@pytest.fixture(scope="module")
def tokenizer():
    found = train_tokenizer(["one two three four"] * 4, vocab_size=270)
    found.pad_token = found.eos_token
    return found


@pytest.fixture
def model(tokenizer):
    found = tiny_model(registry().get("llama"), "sdpa")
    found.resize_token_embeddings(len(tokenizer))
    return found


def data(response=()):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 80, (n,), generator=generator).tolist() for n in LENGTHS]
    return datasets.Dataset.from_list([{"input_ids": [row[0], *response, *row[1:]]} for row in rows])


def padding(features):
    ids = [torch.tensor(each["input_ids"]) for each in features]
    padded = torch.nn.utils.rnn.pad_sequence(ids, True)
    mask = (torch.arange(padded.shape[1]) < torch.tensor([[len(each)] for each in ids])).long()
    labels = padded.masked_fill(mask == 0, -100)
    labels[:, 0] = -100  # which nothing predicts: some Trainers count it
    if "labels" in features[0]:
        labels = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(e["labels"]) for e in features], True, padding_value=-100
        )
    return {"input_ids": padded, "attention_mask": mask, "labels": labels}


def trained(
    model, tokenizer, folder, collator, dataset, *, patched, logits="all", batch_size=4, callbacks=(), **options
):
    """What it came to, and the trainer."""
    model = copy.deepcopy(model)
    if patched:
        apply(model, logits=logits)
    takes = inspect.signature(SFTConfig).parameters
    length = {"max_length": None} if "max_length" in takes else {"max_seq_length": 512}
    config = SFTConfig(
        str(folder),
        per_device_train_batch_size=batch_size,
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        **{
            "learning_rate": LEARNING_RATE,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "max_steps": 3,
            **length,
            **options,
        },
    )
    named = "processing_class" if "processing_class" in inspect.signature(SFTTrainer).parameters else "tokenizer"
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=list(callbacks),
        **{named: tokenizer},
    )
    trainer.train()
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    return Training(losses, None, list(model.parameters())), trainer


@pytest.mark.parametrize("lengths_given", [False, True])
def test_sft_trains_like_padded(model, tokenizer, tmp_path, measured, lengths_given):
    padded, _ = trained(model, tokenizer, tmp_path, padding, data(), patched=False)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=lengths_given)
    packed, trainer = trained(
        model, tokenizer, tmp_path, collator, data(), patched=True, callbacks=[PaddingFreeCallback()]
    )
    claim = f"SFTTrainer{', lengths given' * lengths_given}"
    assert_same_training(packed, padded, model.parameters(), measured, claim, library="trl")
    assert any("padding_saved" in each for each in trainer.state.log_history)


def test_naive_packing_trains_something_else(model, tokenizer, tmp_path):
    """The control."""

    def one_text(features):
        batch = DataCollatorWithFlattening()(features)
        return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None]}

    padded, _ = trained(model, tokenizer, tmp_path, padding, data(), patched=False)
    naive, _ = trained(model, tokenizer, tmp_path, one_text, data(), patched=False)
    assert max(abs(a - b) for a, b in zip(naive.losses, padded.losses)) > 1e-3


def test_sft_on_completions_only_trains_like_padded(model, tokenizer, tmp_path, measured):
    texts = data(response=[85, 86])

    def answers(features):
        return padding([{**each, "labels": [-100] * 3 + each["input_ids"][3:]} for each in features])

    padded, _ = trained(model, tokenizer, tmp_path, answers, texts, patched=False)
    collator = DataCollatorForCompletionOnlyLM([85, 86], tokenizer=tokenizer, padding_free=True)
    packed, _ = trained(model, tokenizer, tmp_path, collator, texts, patched=True)
    assert_same_training(packed, padded, model.parameters(), measured, "SFTTrainer, completions only", library="trl")


@pytest.mark.parametrize("logits", ["labelled", "chunked"])
def test_labelled_logits_train_like_padded(model, tokenizer, tmp_path, measured, logits):
    """From TRL 1.7 on its own fused head computes labelled tokens only, which is left to it, if nobody reads chunks."""
    texts = data(response=[85, 86])

    def answers(features):
        return padding([{**each, "labels": [-100] * 3 + each["input_ids"][3:]} for each in features])

    padded, _ = trained(model, tokenizer, tmp_path, answers, texts, patched=False)
    collator = DataCollatorForCompletionOnlyLM([85, 86], tokenizer=tokenizer, padding_free=True)
    packed, _ = trained(model, tokenizer, tmp_path, collator, texts, patched=True, logits=logits)
    assert_same_training(packed, padded, model.parameters(), measured, f"SFTTrainer, {logits} logits", library="trl")


def test_callback_counts_the_examples_of_packed_rows_in_sft(model, tokenizer, tmp_path):
    """Boundaries survive whatever the trainer does with the columns."""
    packed = pack_dataset(data(), 24)
    _, trainer = trained(
        model,
        tokenizer,
        tmp_path,
        DataCollatorWithFlattening(),
        packed,
        patched=True,
        batch_size=1,
        callbacks=[PaddingFreeCallback(patience=2)],
    )
    logs = [each for each in trainer.state.log_history if "sequences_per_row" in each]
    assert len(logs) == 3 and all(each["sequences_per_row"] > 1 for each in logs)
    restore(trainer.model)


@pytest.mark.skipif(not HAS_PADDING_FREE, reason="this TRL has no padding_free")
def test_trls_own_padding_free_trains_like_padded(model, tokenizer, tmp_path, measured):
    """With its own collator, which it insists on."""
    padded, _ = trained(model, tokenizer, tmp_path, padding, data(), patched=False)
    packed, _ = trained(model, tokenizer, tmp_path, None, data(), patched=True, padding_free=True)
    claim = "SFTTrainer with its own padding_free"
    assert_same_training(packed, padded, model.parameters(), measured, claim, library="trl")
    with pytest.raises(ValueError, match="custom data collator is not supported"):
        trained(model, tokenizer, tmp_path, DataCollatorWithFlattening(), data(), patched=True, padding_free=True)


@pytest.mark.skipif(not HAS_PADDING_FREE, reason="this TRL has no padding_free")
def test_trls_own_packing_is_isolated(model, tokenizer, tmp_path):
    """A row of TRL's has the loss of its examples alone."""
    options = {"packing": True, "max_length": 24, "dataset_kwargs": None}
    _, trainer = trained(model, tokenizer, tmp_path, None, data(), patched=True, batch_size=1, **options)
    row = trainer.train_dataset[0]
    trainer.model.eval()
    batch = trainer.data_collator([row])
    alone, predicted = 0.0, 0
    with torch.no_grad():
        loss = trainer.model(**batch).loss
        restore(trainer.model)
        for ids in torch.tensor(row["input_ids"]).split(row["seq_lengths"]):
            alone += (len(ids) - 1) * trainer.model(input_ids=ids[None], labels=ids[None]).loss
            predicted += len(ids) - 1
        mixed = trainer.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    assert len(row["seq_lengths"]) > 1
    torch.testing.assert_close(loss, alone / predicted)
    assert abs(mixed - loss) > 1e-3  # the control


@pytest.mark.skipif(not HAS_PADDING_FREE, reason="this TRL has no fused head")
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_the_fused_head_predicts_nothing_across_a_boundary(model, tokenizer, tmp_path, lora):
    """TRL's default loss ("nll", or "chunked_nll") calls the decoder past the head; here first labels are kept."""
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    collator, texts = DataCollatorWithFlattening(separator_id=None), list(data())[:4]
    batch = collator(texts)

    def head(*, patched):
        _, trainer = trained(model, tokenizer, tmp_path, collator, data(), patched=patched, learning_rate=0.0)
        return trainer.model.eval()

    patched, alone = head(patched=True), head(patched=False)
    with torch.no_grad():
        found = patched(**batch, fused_lm_head=True)
        expected = [alone(**padding([each]), fused_lm_head=True) for each in texts]
        mixed = alone(**batch, fused_lm_head=True)
    predicted = sum(len(each["input_ids"]) - 1 for each in texts)
    assert found.label_mask.sum() == predicted and mixed.label_mask.sum() == predicted + 3  # the control
    loss = -sum(each.log_probs.sum() for each in expected) / predicted
    torch.testing.assert_close(found.loss, loss, rtol=0, atol=2e-5)


def test_trls_packing_without_boundaries_is_said(model, tokenizer, tmp_path):
    """The only packing of TRL 0.9, and packing_strategy="wrapped": full rows and nothing else."""
    takes = inspect.signature(SFTConfig).parameters
    texts = datasets.Dataset.from_list([{"text": " ".join(["one two three four"] * n)} for n in LENGTHS])
    length = {"max_length": 24} if "max_length" in takes else {"max_seq_length": 24}
    strategy = {"packing_strategy": "wrapped"} if "packing_strategy" in takes else {}
    options = {"packing": True, "dataset_text_field": "text", "dataset_kwargs": None, "max_steps": 14}
    with pytest.warns(UserWarning, match="have full rows, of which nothing says where examples end"):
        _, trainer = trained(
            model, tokenizer, tmp_path, None, texts, patched=True, batch_size=2, **length, **strategy, **options
        )
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) <= {"input_ids", "attention_mask", "labels"} and batch["input_ids"].shape == (2, 24)
    assert (batch["attention_mask"] == 1).all()


@pytest.mark.skipif(not HAS_PADDING_FREE, reason="the page is for TRL that has padding_free")
def test_every_block_for_trl_of_the_page_runs_on_raw_texts(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [{"prompt": "one two " * (1 + i % 3), "completion": "three " * (1 + i % 4)} for i in range(12)]
    names = {"model": model, "tokenizer": tokenizer, "padfree_patch": padfree_patch}
    names["texts"] = datasets.Dataset.from_list(texts)
    ours, own = re.findall(r"^```python trl\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    on_cpu = 'SFTConfig("out", use_cpu=True, bf16=False, '
    exec(ours.replace('SFTConfig("out", ', on_cpu), names)
    packed = [each["sequences_per_row"] for each in names["trainer"].state.log_history if "sequences_per_row" in each]
    assert packed == [4, 4, 4]
    exec(own.replace('SFTConfig(\n    "out", ', on_cpu), names)
    assert len(names["trainer"].state.log_history) == 4
    with pytest.raises(ValueError, match="max_length"):
        exec(own.replace('SFTConfig(\n    "out", ', on_cpu).replace("max_length=None", "max_length=64"), names)
