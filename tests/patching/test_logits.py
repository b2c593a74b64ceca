"""`apply(logits=...)`: what it accepts and refuses, that copies keep it, and that `verify` compares it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.nn import functional as F

import padfree_patch
from padfree_patch import PadfreeError, applied, apply, explain, restore, verify
from padfree_patch.seams.labelled import logits_of
from padfree_patch.testing import checkpointing, conformance, examples, pack

FORMS = ("labelled", "chunked")


@pytest.fixture
def batch():
    sequences = examples((5, 9))
    return pack(sequences) | {"labels": torch.cat(conformance.completions(sequences), dim=1)}


def rows_of(model, batch):
    """How many rows of logits a training forward gives."""
    logits = model.train()(**batch).logits
    return None if logits is None else logits.shape[1]


@pytest.mark.parametrize("given", ["some", None, True, ["labelled"]])
def test_another_value_is_refused_by_name(llama, given):
    with pytest.raises(PadfreeError, match="logits must be one of 'all', 'labelled', 'chunked'; found"):
        apply(llama, logits=given)
    assert not padfree_patch.patching.is_applied(llama)


@pytest.mark.parametrize("logits", FORMS)
def test_a_decoder_without_a_head_is_refused(llama, logits):
    with pytest.raises(PadfreeError, match=f"LlamaModel has no head that predicts tokens, so logits='{logits}'"):
        apply(llama.model, logits=logits)
    assert not padfree_patch.patching.is_applied(llama)


def test_the_newest_apply_decides_and_restore_ends_it(llama, batch):
    total = batch["labels"].shape[1]
    assert rows_of(apply(llama, logits="labelled"), batch) == 7
    assert rows_of(apply(llama, logits="chunked"), batch) is None
    with applied(llama):
        assert rows_of(llama, batch) == total
    assert logits_of(llama) == "chunked"
    with pytest.raises(PadfreeError), applied(llama, logits="labelled"):
        assert rows_of(llama, batch) == 7
        raise PadfreeError("of the body")
    assert rows_of(llama, batch) is None
    assert rows_of(apply(llama), batch) == total
    assert logits_of(restore(llama)) == "all"


def test_copies_and_pickles_keep_it(llama, batch):
    apply(llama, logits="labelled")
    file = io.BytesIO()
    torch.save(llama, file)
    file.seek(0)
    for copied in (copy.deepcopy(llama), torch.load(file, weights_only=False)):
        assert rows_of(copied, batch) == 7


def test_explain_says_what_training_gives(llama):
    apply(llama, logits="labelled")
    assert "training forwards with labels: logits of the N tokens that predict a label" in str(explain(llama))
    assert explain(llama).as_dict()["logits"] == "labelled" and logits_of(llama) == "labelled"
    assert "training forwards with labels" not in str(explain(apply(llama)))


@pytest.fixture
def penalised(llama, monkeypatch):
    """Llama with a loss that has a term of all logits, in the forward itself."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)[0]
        logits = self.lm_head(hidden)
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return {"loss": loss + logits.logsumexp(-1).square().mean(), "logits": logits}

    monkeypatch.setattr(type(llama), "forward", forward)
    return llama


@pytest.mark.parametrize("logits", FORMS)
def test_a_loss_that_needs_all_logits_is_refused(penalised, logits):
    """With its own forward, no name tells: the loss on the model itself does."""
    apply(penalised)
    restore(penalised)
    with pytest.raises(PadfreeError, match=f"LlamaForCausalLM: with logits='{logits}', loss or gradients are off by"):
        apply(penalised, logits=logits)
    assert not padfree_patch.patching.is_applied(penalised)


def test_verify_measures_it_and_finds_a_head_that_was_replaced(llama, monkeypatch):
    assert "labelled" not in str(verify(apply(llama)))
    result = verify(apply(llama, logits="labelled"))
    assert result and result.labelled_error <= 1e-6 and "loss and gradients, labelled and all" in str(result)
    head = llama.lm_head.forward
    monkeypatch.setattr(llama.lm_head, "forward", lambda hidden: head(hidden - hidden.mean(1, keepdim=True)))
    # Every row depends on all: its examples mix as well, unless the head only looks at the rows that it is given.
    found = verify(llama)
    assert not found and found.labelled_error > found.labelled_tolerance


@pytest.mark.parametrize("logits", FORMS)
def test_verify_leaves_nothing_behind(llama, logits):
    apply(llama, logits=logits)
    llama.train()
    assert verify(llama) and llama.training
    assert all(each.grad is None and each.requires_grad for each in llama.parameters())
    checkpointing(reentrant=True)(llama)
    assert verify(llama)


def test_what_cannot_be_compared_is_said(llama):
    """A wrapper that hands the loss on under another name."""

    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids=None, position_ids=None, attention_mask=None, labels=None):
            return self.inner(input_ids, attention_mask, position_ids).logits

    with pytest.warns(UserWarning, match="could not compare logits='labelled' with all: the model gives no loss for"):
        apply(Wrapper(llama), logits="labelled")
