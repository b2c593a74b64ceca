"""Weights that are not there yet: apply warns that nothing shows, and the first packed training call is checked."""

from __future__ import annotations

import warnings

import pytest
import torch

import padfree_patch
from padfree_patch import LeakError, PadfreeError, verification

pytestmark = pytest.mark.versions


def fill(value):
    def filled(model):
        for parameter in model.parameters():
            parameter.data.fill_(value)

    return filled


def memory_as_it_was(model):
    """What `torch.empty` may give: any bits."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        bits = torch.randint(0, 2**31 - 1, parameter.shape, generator=generator, dtype=torch.int32)
        parameter.data = bits.view(torch.float32).clone()


def tied_pair_missing(model):
    model.get_output_embeddings().weight.data.fill_(float("nan"))


MISSING = [fill(float("nan")), fill(1e38), fill(0.0), memory_as_it_was, tied_pair_missing]


@pytest.mark.parametrize("lose", MISSING, ids=["nan", "huge", "zeros", "any bits", "tied pair"])
def test_weights_that_are_missing_are_a_warning_and_checked_at_the_first_packed_training_call(
    llama, batch, lose, monkeypatch
):
    weights = {name: value.clone() for name, value in llama.state_dict().items()}
    lose(llama)
    with pytest.warns(
        UserWarning, match=r"apply could not check its work: its outputs .* as if its weights were not loaded yet"
    ):
        padfree_patch.apply(llama)
    llama.load_state_dict(weights)
    checked = []
    verify = verification.verify
    monkeypatch.setattr(verification, "verify", lambda model: checked.append(model) or verify(model))
    with torch.no_grad():
        llama(**batch)
    llama.eval()(**batch)
    assert not checked
    llama.train()(input_ids=batch["input_ids"])
    assert not checked
    for _ in range(2):
        llama(**batch, labels=batch["input_ids"]).loss.backward()
    assert checked == [llama]


def test_first_packed_training_call_finds_a_leak(llama, batch, monkeypatch):
    fill(0.0)(llama)
    with pytest.warns(UserWarning, match="could not check its work"):
        padfree_patch.apply(llama)
    leaky = padfree_patch.Verification("Tiny", logit_change=0.5, leaked_gradient=0.1, alone_error=0.5)
    monkeypatch.setattr(verification, "verify", lambda model: leaky)
    with pytest.raises(LeakError, match="which apply could not check, does not isolate its examples"):
        llama.train()(**batch)


def test_packed_rows_that_are_not_finite_are_an_error_where_one_example_is(llama, monkeypatch):
    """The control: what is ours to answer for is no warning."""
    broken = padfree_patch.Verification(
        "Tiny", logit_change=float("nan"), leaked_gradient=0.0, alone_error=float("nan")
    )
    monkeypatch.setattr(verification, "verify", lambda model: broken)
    with pytest.raises(PadfreeError, match="gives logits that are not finite; it was put back as it was"):
        padfree_patch.apply(llama)


def test_weights_that_are_there_are_checked_at_once(llama, batch, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        padfree_patch.apply(llama)
    monkeypatch.setattr(verification, "verify", lambda model: pytest.fail("checked again"))
    llama.train()(**batch)
