"""Promise 1 and 2: a head's forward that a kernel library replaces after `apply` gets the labels that ours would get.

The Trainer does so with `use_liger_kernel=True`.
"""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch.nn import functional as F

import padfree_patch
from padfree_patch import PadfreeError
from padfree_patch.testing import examples, pack

pytestmark = pytest.mark.versions


def own_forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, **kwargs):
    """Goes from the decoder's output to the loss, as Liger's `lce_forward` does."""
    hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)[0]
    logits = self.lm_head(hidden)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    return {"loss": loss, "logits": logits}


def losses_alone(model, ids):
    with torch.no_grad():
        losses = [(model(input_ids=each, labels=each).loss.item(), each.shape[1] - 1) for each in ids]
    return sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)


@pytest.fixture
def flattened():
    """A row whose labels are the tokens themselves, first tokens too, and its examples."""
    ids = examples((3, 2, 4, 3))
    batch = pack(ids)
    return batch | {"labels": batch["input_ids"]}, ids


@pytest.mark.parametrize("where", ["instance", "class"])
def test_head_replaced_after_apply_ignores_labels_at_boundaries(llama, flattened, where, monkeypatch):
    batch, ids = flattened
    expected = losses_alone(llama, ids)
    plain = copy.deepcopy(llama)
    padfree_patch.apply(llama)
    if where == "class":
        monkeypatch.setattr(type(llama), "forward", own_forward)
    else:
        llama.forward = types.MethodType(own_forward, llama)
    with torch.no_grad():
        assert abs(llama(**batch)["loss"].item() - expected) < 1e-5
        plain.forward = types.MethodType(own_forward, plain)
        assert abs(plain(**batch)["loss"].item() - expected) > 1e-2  # the control


def test_replaced_head_that_is_called_past_us_is_an_error(llama, flattened):
    """PEFT's tuners call `model.forward(...)`, which reaches no `__call__`."""
    batch, _ = flattened
    padfree_patch.apply(llama).forward = types.MethodType(own_forward, llama)
    with pytest.raises(PadfreeError, match=r"LlamaForCausalLM.forward was replaced by .*own_forward after apply"):
        llama.forward(**batch)


def test_decoder_called_alone_needs_no_head(llama, batch):
    """The control: whoever holds the model may call its decoder; only the head's own forward may not go past us."""

    def hidden_states(model):
        return model.model(**batch)[0]

    padfree_patch.apply(llama).forward = types.MethodType(own_forward, llama)
    assert hidden_states(llama).shape[1] == batch["input_ids"].shape[1]


def test_a_function_of_other_names_is_called_by_position_as_unpatched(llama, batch):
    """What somebody puts on the instance may have no name of upstream's."""
    ids, mask = batch["input_ids"], torch.ones_like(batch["input_ids"])

    def replace_and_call(model):
        inner = model.forward
        model.forward = lambda tokens, real=None: inner(input_ids=tokens, attention_mask=real)
        return model(ids, mask).logits

    expected = replace_and_call(copy.deepcopy(llama))
    assert torch.equal(replace_and_call(padfree_patch.apply(llama)), expected)
