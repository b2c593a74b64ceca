"""Logits of labelled tokens only, where the head is not upstream's own: adapters in it, fused losses, a compiler."""

from __future__ import annotations

import types
import warnings

import peft
import pytest
import torch
from packaging.version import Version
from torch.nn import functional as F

import padfree_patch
from helpers.labelled import assert_same_step, training_step
from padfree_patch import PadfreeError, apply
from padfree_patch.integrations.padded import pack_padded
from padfree_patch.registry import registry
from padfree_patch.seams import labelled
from padfree_patch.testing import conformance, examples, pack, pad, tiny_model

SEQUENCES = examples(conformance.LENGTHS)


@pytest.fixture
def batch():
    return pack(SEQUENCES) | {"labels": torch.cat(conformance.completions(SEQUENCES), dim=1)}


def make(**config):
    return tiny_model(registry().get("llama"), "sdpa", **config)


ON_THE_HEAD = {
    "lora": {"target_modules": ["q_proj", "lm_head"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.versions
@pytest.mark.parametrize("first", ["apply", "get_peft_model"])
@pytest.mark.parametrize("kind", ON_THE_HEAD)
def test_adapters_on_the_head_are_trained_as_with_all_logits(logits, batch, kind, first):
    if kind == "lora" and Version(peft.__version__) < Version("0.8"):
        pytest.skip("this peft needs more to adapt a head")

    def adapted(model):
        torch.manual_seed(1)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, init_lora_weights=False, **ON_THE_HEAD[kind])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft 0.18 about a head that could be tied
            return peft.get_peft_model(model, config)

    def patched(model):
        return apply(model, logits=logits)

    model = patched(adapted(make())) if first == "get_peft_model" else adapted(patched(make()))
    expected = training_step(apply(adapted(make())), batch)
    assert any("lm_head" in name for name in expected[1])
    assert_same_step(training_step(model, batch), expected)
    assert padfree_patch.verify(model)


def fused(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, **kwargs):
    """Goes from hidden states to the loss without giving logits, as Liger's `lce_forward` does in training."""
    hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)[0]
    self.rows = hidden.shape[1]
    logits = self.lm_head(hidden)
    if labels is None:
        return {"logits": logits}
    labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    return {"loss": loss, "logits": None if self.training else logits}


@pytest.mark.versions
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["class", "instance"])
def test_a_fused_loss_gets_labelled_rows(batch, monkeypatch, where, when):
    """Liger puts its forward on the class, or with the Trainer's use_liger_kernel on the instance, after apply."""
    expected = training_step(apply(make()), batch)
    model = make()
    if when == "after":
        apply(model, logits="labelled")
    if where == "class":
        monkeypatch.setattr(type(model), "forward", fused)
    else:
        if when == "before":
            pytest.skip("apply refuses a forward that is on the instance already: test_refusals.py")
        model.forward = types.MethodType(fused, model)
    if when == "before":
        apply(model, logits="labelled")
    assert_same_step(training_step(model, batch), expected)
    assert model.rows == 12
    padfree_patch.restore(model)


def test_a_forward_that_only_calls_ours_is_called_for_each_chunk(batch, monkeypatch):
    """Such as the autocast that accelerate puts on the instance. What hangs on the model is called once."""
    monkeypatch.setattr(labelled, "CHUNK", 4)
    expected, called, rows = training_step(apply(make()), batch), [], []
    model = apply(make(), logits="chunked")
    model.forward = torch.autocast("cpu", torch.bfloat16, enabled=False)(model.forward)
    model.register_forward_pre_hook(lambda *_: called.append(True))
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    assert_same_step(training_step(model, batch), expected)
    assert max(rows) == 5 and called == [True]  # four rows and one of zeros


def test_a_forward_of_ones_own_is_called_once(batch, monkeypatch):
    """It may do anything with labels and loss: the square of a sum over chunks is not the sum of their squares."""
    monkeypatch.setattr(labelled, "CHUNK", 4)

    def squared(model):
        ours = model.forward

        def forward(**given):
            output = ours(**given)
            assert (given["labels"] != -100).any()
            output["loss"] = output["loss"] ** 2
            return output

        model.forward = forward
        return model

    expected = training_step(squared(apply(make())), batch)
    assert_same_step(training_step(squared(apply(make(), logits="chunked")), batch), expected)


def test_a_forward_over_ours_is_served_once(logits, batch):
    """Somebody's forward on the instance that calls ours, as accelerate's for mixed precision does."""
    expected = training_step(apply(make()), batch)
    model = apply(make(), logits=logits)
    ours = model.forward
    model.forward = types.MethodType(lambda self, **given: ours(**given), model)
    assert_same_step(training_step(model, batch), expected)


def test_trls_fused_head_gets_all_tokens(batch):
    """It computes labelled tokens only by itself, and gives a value for each token."""
    model = apply(make(), logits="labelled").train()
    ours, seen = model.forward, []

    def forward(self, *args, fused_lm_head=False, labels=None, **given):
        seen.append(labels.shape[1])
        return self.model(*args, **given) if fused_lm_head else ours(*args, labels=labels, **given)

    model.forward = types.MethodType(forward, model)
    assert model(**batch, fused_lm_head=True)[0].shape[1] == batch["labels"].shape[1] == seen[0]
    assert model(**batch).logits.shape[1] == 12


TRLS = """
def compute_loss(self, model, inputs):
    outputs = model(**inputs)
    return outputs.loss, outputs.logits
"""


def test_trls_trainer_that_reads_all_logits_is_refused_by_name(logits, batch):
    """As SFTTrainer of TRL 0.25 does, unless Liger makes none."""
    space = {"__name__": "trl.trainer.sft_trainer"}
    exec(TRLS, space)
    compute_loss, model = space["compute_loss"], apply(make(), logits=logits).train()
    trainer = types.SimpleNamespace(args=types.SimpleNamespace(use_liger_kernel=False))
    with pytest.raises(PadfreeError, match=r"trl.trainer.sft_trainer.compute_loss reads the logits of all tokens"):
        compute_loss(trainer, model, batch)
    trainer.args.use_liger_kernel = True
    assert compute_loss(trainer, model, batch)[0].isfinite()
    assert compute_loss(trainer, apply(model), batch)[1].shape[1] == batch["labels"].shape[1]


def test_padded_batches_that_are_packed_inside_are_served(logits):
    """And what hangs on the decoder gets all its hidden states, once."""
    padded = pad(SEQUENCES)
    expected = training_step(make(), padded)
    model = apply(make(), logits=logits)
    seen = []
    pack_padded(model)
    model.model.register_forward_hook(lambda module, args, output: seen.append(output[0].shape[:2]))
    found = training_step(model, padded)
    assert_same_step(found, expected)
    assert seen == [(4, 12)]


@pytest.mark.slow
def test_compiled_model_trains_as_with_all_logits(logits, batch):
    torch._dynamo.reset()
    expected = training_step(apply(make()), batch)
    compiled = torch.compile(apply(make(), logits=logits), backend="aot_eager")
    output = compiled.train()(**batch)
    output.loss.backward()
    gradients = {name: each.grad for name, each in compiled._orig_mod.named_parameters() if each.grad is not None}
    assert_same_step((output.loss.item(), gradients, output), expected)
    torch._dynamo.reset()
