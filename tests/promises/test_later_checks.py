"""What comes after apply is checked at the next packed call, and at every one until it is right (promise 2)."""

from __future__ import annotations

import copy
import importlib
import sys

import peft
import pytest
import torch
import transformers

import padfree_patch
from padfree_patch import LeakError, PadfreeError, patching
from padfree_patch.registry import registry
from padfree_patch.seams.adapters import PEFT
from padfree_patch.testing import examples, pack, tiny_model
from padfree_patch.wrapping import seam
from padfree_patch.wrapping.seam import is_wrapper
from peft_methods import INVOCATION, methods, texts

pytestmark = [pytest.mark.versions, pytest.mark.filterwarnings("ignore")]  # PEFT's own


def lora(**config):
    return peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **config)


def sum_over_row(module, args, output):
    return output + output.cumsum(1)


def leak_in_adapter(model):
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].register_forward_hook(sum_over_row)
    return model


@pytest.fixture
def leaky(llama):
    """A patched model, whose adapter came later and mixes the row."""
    return leak_in_adapter(peft.get_peft_model(padfree_patch.apply(llama), lora()))


def look(model):
    padfree_patch.explain(model)


def apply_for_a_while(model):
    with padfree_patch.applied(model, verify=False):
        pass


@pytest.mark.parametrize("before", [lambda model: None, look, apply_for_a_while])
def test_an_adapter_that_mixes_is_an_error_at_every_packed_call(leaky, batch, before):
    before(leaky)
    for _ in range(2):
        with pytest.raises(LeakError, match=r"with LoraConfig, which came after padfree_patch\.apply, does not"):
            leaky(**batch)


def call_disabled(model, batch):
    with model.disable_adapter():
        model(**batch)


def call_merged(model, batch):
    model.merge_adapter()
    model(**batch)
    model.unmerge_adapter()


@pytest.mark.parametrize("call", [call_disabled, call_merged])
def test_a_call_without_the_adapter_is_no_check_of_it(leaky, batch, call):
    with torch.no_grad():
        call(leaky, batch)
    with pytest.raises(LeakError, match="does not isolate its examples"):
        leaky(**batch)


def test_another_adapter_of_a_name_that_was_checked_is_checked(llama, batch):
    model = peft.get_peft_model(padfree_patch.apply(llama), lora())
    model(**batch)
    again = leak_in_adapter(peft.get_peft_model(model.unload(), lora()))
    with pytest.raises(LeakError, match="does not isolate its examples"):
        again(**batch)


@pytest.mark.skipif("LORA, activated (aLoRA)" not in methods(), reason="this PEFT has no activated LoRA")
def test_activated_adapter_of_a_name_that_was_checked_is_refused(llama):
    model = peft.get_peft_model(padfree_patch.apply(llama), lora())
    model(**pack(texts()))
    again = peft.get_peft_model(model.unload(), lora(alora_invocation_tokens=INVOCATION))
    with pytest.raises(PadfreeError, match="begins where a row has its invocation tokens for the last time"):
        again(**pack(texts()))


def test_weights_that_came_later_and_mix_are_an_error_at_every_packed_training_call(llama, batch):
    weights = {name: value.clone() for name, value in llama.state_dict().items()}
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.zero_()
    llama.model.layers[0].mlp.register_forward_hook(sum_over_row)
    padfree_patch.apply(llama)
    llama.load_state_dict(weights)
    for _ in range(2):
        with pytest.raises(LeakError, match="which apply could not check, does not isolate its examples"):
            llama.train()(**batch)


def test_labels_of_a_token_classifier_are_its_own_from_the_first_call_on():
    texts, labels = examples((4, 5)), [torch.tensor([[0, 1, 2, 1]]), torch.tensor([[2, 2, 0, 1, 0]])]
    head = transformers.LlamaForTokenClassification if hasattr(transformers, "LlamaForTokenClassification") else None
    if head is None:
        pytest.skip("this transformers has none for Llama")
    model = head(tiny_model(registry().get("llama"), num_labels=3).config).eval()
    with torch.no_grad():
        alone = sum(model(input_ids=ids, labels=own).loss * own.numel() for ids, own in zip(texts, labels)) / 9
        adapted = peft.get_peft_model(
            padfree_patch.apply(model), peft.LoraConfig(task_type="TOKEN_CLS", target_modules=["q_proj"])
        ).eval()
        for _ in range(2):
            torch.testing.assert_close(adapted(**pack(texts), labels=torch.cat(labels, 1)).loss, alone)


@pytest.fixture
def peft_imported_later(monkeypatch, clean_start):
    """Makes PEFT's models unknown, and imports them anew when called."""
    for name in PEFT:
        monkeypatch.setattr(peft, name.split(".")[1], sys.modules[name])
        monkeypatch.delitem(sys.modules, name)
    return lambda: {name: importlib.import_module(name) for name in PEFT}["peft.peft_model"]


def test_model_is_put_into_a_peft_that_was_imported_later(llama, batch, peft_imported_later):
    padfree_patch.apply(llama)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft_imported_later().PeftModelForCausalLM(llama, config)
    with pytest.raises(PadfreeError, match=r"with PromptTuningConfig puts virtual tokens before each row"):
        model(**batch)
    assert not seam.waiting
    padfree_patch.restore(model)
    assert not is_wrapper(type(model).forward)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, 0] = (changed["input_ids"][0, 0] + 1) % 90
    assert not torch.equal(*(model(**each).logits[:, -1] for each in (batch, changed)))  # the control: it mixes


def test_a_library_that_is_never_imported_is_not_waited_for_any_more(llama, peft_imported_later):
    padfree_patch.apply(llama)
    finders = list(sys.meta_path)  # wrapt's among them, which stays: one for whatever is waited for
    padfree_patch.restore(padfree_patch.apply(copy.deepcopy(llama)))
    assert seam.waiting
    padfree_patch.restore(llama)
    assert sys.meta_path == finders and not seam.waiting
    assert not is_wrapper(peft_imported_later().PeftModel.forward)


def test_every_model_of_peft_is_entered():
    there = {each for name in PEFT for each in vars(sys.modules[name]).values() if isinstance(each, type)}
    forwards = {
        (each.__module__, each.__name__) for each in there if each.__module__ in PEFT and "forward" in vars(each)
    }
    assert forwards == {(name, each) for name, classes in PEFT.items() for each in classes}


def test_wrappers_around_a_patched_model_are_not_patched_themselves(llama):
    model = peft.get_peft_model(padfree_patch.apply(llama), lora())
    with padfree_patch.applied(model):
        padfree_patch.restore(model)
    assert patching.is_applied(model)
    padfree_patch.restore(llama)
    assert not patching.is_applied(model)
