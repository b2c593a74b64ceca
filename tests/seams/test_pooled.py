"""Classifiers and reward models on packed rows: a result for each sequence, which is upstream's of it alone."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification

import padfree_patch
from padfree_patch import DataCollatorForSequenceClassification, PadfreeError
from padfree_patch.testing import TINY, conformance, examples

pytestmark = pytest.mark.versions

LENGTHS = (5, 9, 1, 4)
END = 3
"""A token that tokenizers use for padding and for the end of a text."""


def classifier(config, *, labels=3, seed=0, **changes):
    config = copy.deepcopy(config)
    config.update({"num_labels": labels, "pad_token_id": END, "problem_type": None, **changes})
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(config)


def texts(last=None):
    found = [ids[0] for ids in examples(LENGTHS)]
    found = [torch.where(ids == END, END + 1, ids) for ids in found]
    if last is not None:
        for ids in found[:2]:
            ids[-1] = last
    return found


def batch_of(found, labels, **options):
    rows = [{"input_ids": ids.tolist(), "label": label} for ids, label in zip(found, labels)]
    return DataCollatorForSequenceClassification(**options)(rows)


def alone(model, found):
    return torch.cat([model(input_ids=ids[None]).logits for ids in found])


def assert_same(model, unpatched, found, labels, **options):
    """Asserts that loss, logits and gradients of a packed row are those of each example alone."""
    batch = batch_of(found, labels, **options)
    expected = alone(unpatched, found)
    loss = torch.nn.functional.cross_entropy(expected, torch.tensor(labels))
    output = model(**batch)
    assert output.logits.shape == expected.shape
    assert conformance.largest(output.logits - expected) < conformance.LOGIT_TOLERANCE * conformance.largest(expected)
    torch.testing.assert_close(output.loss, loss, rtol=2e-5, atol=2e-5)
    output.loss.backward()
    loss.backward()
    for (name, mine), theirs in zip(model.named_parameters(), unpatched.parameters()):
        assert conformance.largest(mine.grad - theirs.grad) < 2e-4 * conformance.largest(theirs.grad) + 1e-8, name


@pytest.mark.parametrize("last", [None, END], ids=["", "ends with the padding token"])
def test_a_score_of_each_sequence_is_that_of_it_alone(make, last):
    unpatched = classifier(make().config)
    model = padfree_patch.apply(copy.deepcopy(unpatched))
    assert_same(model, unpatched, texts(last), [0, 2, 1, 1])
    row = unpatched(**{k: v for k, v in batch_of(texts(last), [0] * 4).items() if k in ("input_ids", "position_ids")})
    assert len(row.logits) == 1  # the control: upstream gives one result for the row


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "qwen3"])
def test_decoders_without_a_patch_have_heads_too(name):
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 99} if name == "gpt2" else TINY
    config = transformers.CONFIG_MAPPING[name](**sizes)
    for dropout in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        setattr(config, dropout, 0.0)
    unpatched = classifier(config).eval()
    try:
        model = padfree_patch.apply(copy.deepcopy(unpatched))
    except PadfreeError as error:
        pytest.skip(f"no way on transformers {transformers.__version__}: {error}")
    assert_same(model, unpatched, texts(END), [0, 2, 1, 1])


def test_what_a_call_may_bring_along(llama):
    unpatched = classifier(llama.config)
    model = padfree_patch.apply(copy.deepcopy(unpatched))
    found = texts()
    expected = alone(unpatched, found)
    batch = batch_of(found, [0, 2, 1, 1])
    more = {
        "padding at the end": batch_of(found, [0, 2, 1, 1], pad_to_multiple_of=16),
        "positions only": {name: batch[name] for name in ("input_ids", "position_ids")},
        "embeddings": {
            "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]),
            "position_ids": batch["position_ids"],
        },
        "a tuple": {**batch, "return_dict": False},
        "no cache": {**batch, "use_cache": False},
    }
    for name, call in more.items():
        output = model(**call)
        logits = output[1] if name == "a tuple" else output.logits
        assert conformance.largest(logits - expected) < 2e-5, name
        if "labels" in call:
            torch.testing.assert_close(output[0], batch_loss(expected, batch))
    torch.testing.assert_close(alone(model, found), expected, rtol=0, atol=0)  # ordinary calls are upstream's


def batch_loss(logits, batch):
    return torch.nn.functional.cross_entropy(logits, batch["labels"])


@pytest.mark.parametrize(
    ("labels", "values", "loss"),
    [
        (1, [0.5, 2.0, -1.0, 0.0], torch.nn.functional.mse_loss),
        (2, [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]], torch.nn.functional.binary_cross_entropy_with_logits),
    ],
    ids=["regression", "several labels"],
)
def test_every_kind_of_loss_is_upstreams(llama, labels, values, loss):
    unpatched = classifier(llama.config, labels=labels)
    model = padfree_patch.apply(copy.deepcopy(unpatched))
    expected = alone(unpatched, texts())
    output = model(**batch_of(texts(), values))
    torch.testing.assert_close(output.loss, loss(expected.squeeze(-1), torch.tensor(values)), rtol=2e-5, atol=2e-5)
    assert model.config.problem_type  # upstream notes it too


def test_head_goes_on_where_models_go(llama, tmp_path):
    unpatched = classifier(llama.config)
    model = padfree_patch.apply(copy.deepcopy(unpatched))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(copy.deepcopy(model).train(), copy.deepcopy(unpatched), texts(), [0, 2, 1, 1])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(alone(loaded, texts()), alone(unpatched, texts()))
    padfree_patch.restore(model)
    assert len(model(input_ids=torch.cat(texts())[None]).logits) == 1


def test_lora_of_a_classifier_is_exact(llama):
    peft = pytest.importorskip("peft")
    unpatched = classifier(llama.config)
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(unpatched, config)
    model = padfree_patch.apply(copy.deepcopy(adapted))
    expected = alone(adapted, texts())
    output = model(**batch_of(texts(), [0, 2, 1, 1]))
    assert conformance.largest(output.logits - expected) < 2e-5
    output.loss.backward()
    batch_loss(expected, batch_of(texts(), [0, 2, 1, 1])).backward()
    for (name, mine), theirs in zip(model.named_parameters(), adapted.parameters()):
        if mine.requires_grad and theirs.grad is not None:
            assert conformance.largest(mine.grad - theirs.grad) < 2e-4 * conformance.largest(theirs.grad) + 1e-8, name


def test_labels_that_do_not_fit_are_said(llama):
    model = padfree_patch.apply(classifier(llama.config))
    batch = batch_of(texts(), [0, 2, 1, 1])
    with pytest.raises(PadfreeError, match=r"labels of shape \(3,\) for a packed batch of 4 sequences"):
        model(**{**batch, "labels": batch["labels"][:3]})
    rows = padfree_patch.DataCollatorWithFlattening()([{"input_ids": ids.tolist()} for ids in texts()])
    with pytest.raises(PadfreeError, match="DataCollatorForSequenceClassification makes them"):
        model(**rows)
