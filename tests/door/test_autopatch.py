"""autopatch: whatever transformers makes is patched when it is made, by plain functions that can be taken out again."""

from __future__ import annotations

import gc
import re
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

import padfree_patch
from helpers.door import tiny_config
from padfree_patch import PadfreeError, autopatch, patching

pytestmark = pytest.mark.versions

MAKERS = ("from_pretrained", "_from_config")


@pytest.fixture(autouse=True)
def _as_before():
    before = {name: vars(PreTrainedModel)[name] for name in MAKERS}
    yield
    for name, own in before.items():
        setattr(PreTrainedModel, name, own)


@pytest.fixture
def folder(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    return tmp_path


def test_models_are_patched_however_they_are_made(folder):
    with autopatch() as handle:
        by_name = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
        by_config = AutoModelForCausalLM.from_config(tiny_config())
        by_class, info = type(by_name).from_pretrained(folder, output_loading_info=True)
    assert all(map(patching.is_applied, (by_name, by_config, by_class)))
    assert handle.models == [by_name, by_config, by_class]
    assert info["missing_keys"] == [] or info["missing_keys"] == set()
    assert padfree_patch.verify(by_name)
    past = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")  # the control
    assert not patching.is_applied(past) and not padfree_patch.verify(past)


def test_hooks_are_taken_out_whole(folder):
    before = {name: vars(PreTrainedModel)[name] for name in MAKERS}
    handle = autopatch()
    assert all(vars(PreTrainedModel)[name] is not own for name, own in before.items())
    handle.remove()
    assert {name: vars(PreTrainedModel)[name] for name in MAKERS} == before


def test_hooks_in_somebody_elses_wrapper_pass_on_once_they_are_removed(folder):
    handle = autopatch()
    ours = vars(PreTrainedModel)["from_pretrained"].__func__
    PreTrainedModel.from_pretrained = theirs = classmethod(lambda cls, *args, **kwargs: ours(cls, *args, **kwargs))
    handle.remove()
    assert vars(PreTrainedModel)["from_pretrained"] is theirs
    assert not patching.is_applied(AutoModelForCausalLM.from_pretrained(folder))
    assert not handle.models


def test_a_loader_that_takes_the_function_apart_finds_ours_and_puts_it_back(folder):
    """As ms-swift's loader does, behind which a proxy of wrapt's was lost for good."""
    with autopatch() as handle:
        function = PreTrainedModel.from_pretrained.__func__
        PreTrainedModel.from_pretrained = classmethod(lambda cls, *args, **kwargs: function(cls, *args, **kwargs))
        model = AutoModelForCausalLM.from_pretrained(folder)
        PreTrainedModel.from_pretrained = classmethod(function)
        again = AutoModelForCausalLM.from_pretrained(folder)
    assert handle.models == [model, again]


def test_what_is_made_inside_of_another_model_is_patched_with_it(monkeypatch, llama, folder):
    """Composite models make their parts by _from_config, on the meta device, before the weights are there."""
    made = []
    real = vars(PreTrainedModel)["from_pretrained"].__func__

    def with_a_part(cls, name, *args, **kwargs):
        made.append(AutoModelForCausalLM.from_config(tiny_config()))
        return real(cls, name, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(with_a_part))
    with autopatch() as handle:
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert not patching.is_applied(made[0]) and handle.models == [model]
        with pytest.raises(OSError, match="file named"):  # after which the next one is the outermost again
            type(model).from_pretrained(folder / "..")
        assert patching.is_applied(AutoModelForCausalLM.from_config(tiny_config()))


def test_another_thread_makes_models_of_its_own(folder):
    made = []
    with autopatch() as handle:
        thread = threading.Thread(target=lambda: made.append(AutoModelForCausalLM.from_pretrained(folder)))
        thread.start()
        thread.join()
    assert handle.models == made


def test_a_second_autopatch_patches_once_and_with_its_own_backend(folder):
    with autopatch() as outer, autopatch(backend="sdpa") as inner:
        model = AutoModelForCausalLM.from_pretrained(folder)
    assert (outer.models, inner.models) == ([], [model])
    padfree_patch.apply(model)
    padfree_patch.restore(model)
    assert not patching.is_applied(model)


def test_models_are_not_kept_alive(folder):
    with autopatch() as handle:
        AutoModelForCausalLM.from_pretrained(folder)
    gc.collect()
    assert not handle.models


def test_model_of_the_meta_device_is_patched(folder):
    with autopatch() as handle, torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config())
    assert handle.models == [model] and patching.is_applied(model)


def test_unknown_backend_is_refused_before_anything_changes():
    before = vars(PreTrainedModel)["from_pretrained"]
    with pytest.raises(PadfreeError, match="unknown backend 'fast'; choose auto or one of these"):
        autopatch(backend="fast")
    assert vars(PreTrainedModel)["from_pretrained"] is before


def test_a_model_that_cannot_be_patched_is_left_alone_with_a_line(capfd):
    config = T5Config(vocab_size=90, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with autopatch() as handle:
        model = T5ForConditionalGeneration._from_config(config)
    assert not handle.models and not patching.is_applied(model)
    line = r"padfree-patch: T5ForConditionalGeneration \(t5\) is left unpatched: .* is an encoder-decoder .*\n"
    assert re.fullmatch(line, capfd.readouterr().err)
