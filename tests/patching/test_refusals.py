"""Promise 2: apply refuses with the reason, or warns if it cannot check, and leaves the model as it was."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import padfree_patch
from helpers.snapshots import snapshot
from padfree_patch import PadfreeError, patching, verification
from padfree_patch.registry import registry
from padfree_patch.seams import mask
from padfree_patch.testing import tiny_model
from padfree_patch.wrapping.opt_in import OptIn

pytestmark = pytest.mark.versions


def test_failed_verification_rolls_back(make, monkeypatch):
    model = make()
    before = snapshot(model)
    leaky = padfree_patch.Verification(
        "Tiny", logit_change=0.5, leaked_gradient=0.1, alone_error=0.5, first_leak="model.layers.0.self_attn"
    )
    monkeypatch.setattr(padfree_patch.verification, "verify", lambda model: leaky)
    with pytest.raises(padfree_patch.LeakError, match=r"EXAMPLES MIX(.|\n)*model\.layers\.0\.self_attn"):
        padfree_patch.apply(model)
    assert snapshot(model) == before


class OneExampleOnly(torch.nn.Module):
    """A layer around another that fails on rows as long as the probe's packed one."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states, **kwargs):
        if hidden_states.shape[1] == sum(verification.LENGTHS):
            raise IndexError("too long")
        return self.layer(hidden_states, **kwargs)


def test_model_that_cannot_run_a_packed_row_is_refused(llama):
    """Whatever upstream raises: it is ours to say, and the model is as it was."""
    llama.model.layers[1] = OneExampleOnly(llama.model.layers[1])
    before = snapshot(llama)
    with pytest.raises(PadfreeError, match=r"llama: the patched model can't run a packed row: IndexError.* put back"):
        padfree_patch.apply(llama)
    assert snapshot(llama) == before


def test_model_that_cannot_run_unpatched_either_is_not_called_ours(llama):
    """The control is the test before: the same error, of a model that runs unpatched."""
    llama.model.layers[1] = torch.nn.Linear(2, 2)
    before = snapshot(llama)
    says = r"LlamaForCausalLM fails without padfree_patch too, .*transformers [45]\..*Error\(.*put back.*verify=False"
    with pytest.raises(PadfreeError, match=says):
        padfree_patch.apply(llama)
    assert snapshot(llama) == before


def test_failure_of_the_model_itself_leaves_an_earlier_patch_as_it_was(llama):
    padfree_patch.apply(llama, backend="sdpa")
    llama.model.layers[1] = torch.nn.Linear(2, 2)
    with pytest.raises(PadfreeError, match="fails without padfree_patch too"):
        padfree_patch.apply(llama, backend="auto")
    assert OptIn.of(llama).backend == "sdpa"


def test_unverifiable_model_is_patched_with_a_warning():
    with torch.device("meta"):
        model = tiny_model(registry().get("llama"))
    with pytest.warns(
        UserWarning, match=r"could not check its work: parameter .* on the meta device(.|\n)*verify=False"
    ):
        padfree_patch.apply(model)
    assert patching.is_applied(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"attention": "LlamaAttentionX"},
            "no module of class LlamaAttentionX in .*; found .*LlamaMLP",
        ),
        ({"decoder": "LlamaModelX"}, "no module of class LlamaModelX"),
        ({"attention": "LlamaMLP"}, r"LlamaMLP.forward has no parameter attention_mask; it has (x|hidden_state)"),
    ],
)
def test_changed_upstream_is_refused(llama, monkeypatch, change, message):
    patch = dataclasses.replace(registry().get("llama"), **change)
    monkeypatch.setattr(patching, "patch_for", lambda model: patch)
    before = snapshot(llama)
    with pytest.raises(PadfreeError, match=message) as caught:
        padfree_patch.apply(llama)
    assert "patch tested on >=4" in str(caught.value)
    assert f"transformers {padfree_patch.versions.transformers_version()}" in str(caught.value)
    assert snapshot(llama) == before


def test_missing_mask_builder_is_refused(llama, monkeypatch):
    monkeypatch.setattr(mask, "BUILDER_FUNCTIONS", ("build_no_mask",))
    monkeypatch.setattr(mask, "BUILDER_METHODS", ("_build_no_mask",))
    with pytest.raises(PadfreeError, match="has none of build_no_mask and LlamaModel none of _build_no_mask"):
        padfree_patch.apply(llama)


def test_forward_replaced_on_the_instance_is_refused(llama):
    original = llama.forward
    llama.forward = lambda *args, **kwargs: original(*args, **kwargs)
    with pytest.raises(PadfreeError, match=r"replaced on the instance by .*call padfree_patch\.apply before"):
        padfree_patch.apply(llama)
    assert not patching.is_applied(llama)


def test_prompt_tuning_is_refused(llama):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(PadfreeError, match="puts virtual tokens before each row"):
        padfree_patch.apply(model)
