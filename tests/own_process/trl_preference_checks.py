"""TRL's DPOTrainer and RewardTrainer on a model that packs their padded batches inside, against padded: `nox -s trl`.

The oracle is the same trainer, with its own collator, on the unpatched model.
"""

from __future__ import annotations

import copy
import inspect

import datasets
import pytest
import torch
import transformers
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from helpers.comparison import LEARNING_RATE, Training, assert_same_training
from padfree_patch import DataCollatorForPreference, DataCollatorWithFlattening, PadfreeError, apply
from padfree_patch.integrations.padded import pack_padded
from padfree_patch.measure.texts import train_tokenizer
from padfree_patch.registry import registry
from padfree_patch.testing import tiny_model

NEW = "processing_class" in inspect.signature(DPOTrainer).parameters  # TRL 1.16, not 0.9
TEXTS = ["one two three four", "two", "three four one", "four three two one four two", "one one", "three"]


@pytest.fixture(scope="module")
def tokenizer():
    found = train_tokenizer(["one two three four"] * 4, vocab_size=270)
    found.pad_token = found.eos_token
    found.bos_token = found.eos_token
    return found


@pytest.fixture
def model(tokenizer):
    found = tiny_model(registry().get("llama"), "sdpa")
    found.resize_token_embeddings(len(tokenizer))
    found.config.pad_token_id = tokenizer.pad_token_id
    return found


@pytest.fixture
def judge(model):
    """A reward model around the same decoder."""
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    torch.manual_seed(0)
    return transformers.LlamaForSequenceClassification(config).eval()


def pairs():
    return datasets.Dataset.from_list(
        [{"prompt": f"{a} ", "chosen": b, "rejected": c} for a, b, c in zip(TEXTS, TEXTS[1:] + TEXTS[:1], TEXTS[::-1])]
    )


def options(folder, **more):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 3,
        "learning_rate": LEARNING_RATE,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "max_steps": 2,
        **more,
    }


def run(kind, model, tokenizer, arguments, **more):
    """Trains, and returns what it came to, with the shapes that the layers of the decoder were given."""
    seen = []
    decoder = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model
    watch = decoder.layers[0].register_forward_hook(
        lambda layer, args, kwargs, _: seen.append(shape(args, kwargs)), with_kwargs=True
    )
    named = "processing_class" if NEW else "tokenizer"
    trainer = kind(model=model, args=arguments, **{named: tokenizer}, **more)
    trainer.train()
    watch.remove()
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    return Training(losses, None, list(model.parameters())), seen


def shape(args, kwargs):
    return tuple((args[0] if args else kwargs["hidden_states"]).shape[:2])


def dpo(model, tokenizer, folder, *, packed, lora=False, collator=None, **more):
    model, reference = copy.deepcopy(model), None
    if packed:
        pack_padded(apply(model))
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    else:
        reference = copy.deepcopy(model)
    arguments = DPOConfig(
        **options(folder, **{"max_length": 64} if NEW else {"max_length": 64, "max_prompt_length": 32}, **more)
    )
    return run(
        DPOTrainer, model, tokenizer, arguments, ref_model=reference, train_dataset=pairs(), data_collator=collator
    )


@pytest.mark.parametrize("how", ["whole", "lora", "precomputed", "checkpointing"])
def test_dpo_trains_like_padded(model, tokenizer, tmp_path, measured, how):
    more = {"precomputed": {"precompute_ref_log_probs": True}, "checkpointing": {"gradient_checkpointing": True}}
    chosen = {**more.get(how, {}), "lora": how == "lora"}
    padded, rows = dpo(model, tokenizer, tmp_path, packed=False, **chosen)
    packed, inside = dpo(model, tokenizer, tmp_path, packed=True, **chosen)
    assert {number for number, _ in rows} == {6} and {number for number, _ in inside} == {1}
    assert sum(n * t for n, t in inside) < sum(n * t for n, t in rows)
    before = [copy.deepcopy(p) for p in model.parameters()]
    if how == "lora":
        assert packed.losses == pytest.approx(padded.losses, abs=2e-4)
    else:
        assert_same_training(packed, padded, before, measured, f"DPOTrainer, {how}", library="trl")


def rewards(judge, tokenizer, folder, *, packed, collator=None, **more):
    model = copy.deepcopy(judge)
    if packed:
        pack_padded(apply(model))
    data = pairs().map(lambda row: columns(row, tokenizer), remove_columns=pairs().column_names)
    arguments = RewardConfig(**options(folder, max_length=64, **more))
    return run(RewardTrainer, model, tokenizer, arguments, train_dataset=data, data_collator=collator)


def columns(row, tokenizer):
    ids = {name: tokenizer(row["prompt"] + row[name])["input_ids"] for name in ("chosen", "rejected")}
    if NEW:
        return {f"{name}_ids": each for name, each in ids.items()}
    masks = {f"attention_mask_{name}": [1] * len(each) for name, each in ids.items()}
    return {**{f"input_ids_{name}": each for name, each in ids.items()}, **masks}


def test_rewards_train_like_padded(judge, tokenizer, tmp_path, measured):
    padded, rows = rewards(judge, tokenizer, tmp_path, packed=False)
    packed, inside = rewards(judge, tokenizer, tmp_path, packed=True)
    assert 1 not in {number for number, _ in rows} and {number for number, _ in inside} == {1}
    assert_same_training(packed, padded, judge.parameters(), measured, "RewardTrainer", library="trl")


def test_our_collator_of_pairs_is_refused_by_name(model, judge, tokenizer, tmp_path):
    ours, keep = DataCollatorForPreference(), {"remove_unused_columns": False}
    with pytest.raises(PadfreeError, match=r"DPOTrainer and RewardTrainer among them, .*pack_padded\(model\)"):
        dpo(model, tokenizer, tmp_path, packed=True, collator=ours, **keep)
    renamed = {"match": r"needs a label for each.*pack_padded\(model\)" if NEW else "pair 0 has no chosen_ids"}
    with pytest.raises(PadfreeError, **renamed):
        rewards(judge, tokenizer, tmp_path, packed=True, collator=ours, **keep)
    if not NEW:  # whose columns have other names
        names = {"input_ids_chosen": "chosen_ids", "input_ids_rejected": "rejected_ids"}

        def pairs_in_a_row(features):
            return ours([{names[key]: value for key, value in each.items() if key in names} for each in features])

        with pytest.raises(PadfreeError, match=r"asks a batch .* for input_ids_chosen, a row per answer"):
            rewards(judge, tokenizer, tmp_path, packed=True, collator=pairs_in_a_row, **keep)


def test_rows_of_single_texts_are_refused_by_name(model, tokenizer, tmp_path):
    with pytest.raises(PadfreeError, match="example 0 has no input_ids"):
        dpo(model, tokenizer, tmp_path, packed=True, collator=DataCollatorWithFlattening(), remove_unused_columns=False)
