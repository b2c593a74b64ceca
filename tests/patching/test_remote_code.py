"""Models of a known type whose classes come from elsewhere: patched if they work like upstream's, refused if not."""

from __future__ import annotations

import gc
import importlib.util
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from padfree_patch import PadfreeError, apply, verify
from padfree_patch.registry import registry
from padfree_patch.testing import CHECKS, examples, pack, tiny_model

pytestmark = pytest.mark.versions


NAME = "transformers.models.llama.modeling_remote_llama"  # its relative imports are those of the original's folder


@pytest.fixture
def remote(tmp_path):
    """Loads a changed copy of modeling_llama.py as a module of its own, as trust_remote_code does."""

    def load(*changes: tuple[str, str]):
        source = Path(modeling_llama.__file__).read_text()
        for old, new in changes:
            assert old in source
            source = source.replace(old, new)
        path = tmp_path / "modeling_remote_llama.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(NAME, path)
        module = sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.modules.pop(NAME, None)


def made_by(module, seed=0):
    config = tiny_model(registry().get("llama"), "eager").config
    torch.manual_seed(seed)
    return module.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_remote_copy_is_patched(remote, check):
    module = remote()
    assert type(made_by(module)) is not modeling_llama.LlamaForCausalLM
    check(lambda: made_by(module))


def test_remote_copy_does_not_touch_the_original(remote):
    before = dict(vars(modeling_llama.LlamaAttention))
    apply(made_by(remote()))
    assert dict(vars(modeling_llama.LlamaAttention)) == before


def test_code_that_is_loaded_again_is_patched_again(remote):
    first = apply(made_by(remote()))
    second = apply(made_by(remote()))  # another module object, under the same name
    assert verify(first) and verify(second)


def test_class_goes_with_its_last_model(llama):
    """Nothing that is kept of a function, such as its signature, may hold a class that was made at run time."""

    class Mine(modeling_llama.LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, like=None, **kwargs):
            kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids}
            return super().forward(input_ids, **kwargs)

    Mine.forward.__annotations__["like"] = Mine
    model, other = Mine(llama.config).eval(), apply(llama)
    apply(model)(**pack(examples((3, 4))))
    mine = weakref.ref(Mine)
    del Mine, model
    gc.collect()
    assert mine() is None
    assert verify(other)


def test_subclasses_are_patched():
    class MyAttention(modeling_llama.LlamaAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = tiny_model(registry().get("llama"), "eager")
    for layer in model.model.layers:
        layer.self_attn.__class__ = type("MyAttention", (MyAttention, type(layer.self_attn)), {})
    assert not verify(model)
    apply(model)
    assert verify(model)


def test_attention_class_of_another_name_is_refused(remote):
    module = remote(("LlamaAttention", "CustomAttention"))
    model = made_by(module)
    with pytest.raises(PadfreeError, match=f"no module of class LlamaAttention in LlamaForCausalLM .from {NAME}"):
        apply(model)
    assert not any("_padfree_patch" in vars(each) for each in model.modules())


def test_attention_of_another_kind_is_refused_and_put_back():
    """It mixes tokens without any kernel that is known: the running mean of what came before."""

    class LlamaAttention(nn.Module):
        def __init__(self, like):
            super().__init__()
            self.like = like

        def forward(self, hidden_states, attention_mask=None, position_ids=None, **kwargs):
            count = torch.arange(1, hidden_states.shape[1] + 1).view(1, -1, 1)
            mixed = hidden_states.cumsum(1) / count
            arity = 3 if hasattr(modeling_llama, "LLAMA_ATTENTION_CLASSES") else 2
            return (mixed, None, None)[:arity]

    model = tiny_model(registry().get("llama"), "eager")
    for layer in model.model.layers:
        layer.self_attn = LlamaAttention(layer.self_attn)
    before = LlamaAttention.forward
    with pytest.raises(PadfreeError, match="came to no attention kernel that padfree_patch knows"):
        apply(model)
    assert LlamaAttention.forward is before
    assert not any("_padfree_patch" in vars(each) for each in model.modules())
