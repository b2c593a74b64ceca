"""Models that no patch is registered for come through the door in the first way, and are verified like all others."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

import padfree_patch
from helpers.door import lines, made
from helpers.training import flattening, padding, trainer_of
from padfree_patch import LeakError, PadfreeError, autopatch, patching
from padfree_patch.patching import deferred
from padfree_patch.registry import registry
from padfree_patch.testing import examples, pack
from padfree_patch.wrapping.opt_in import OptIn

pytestmark = pytest.mark.versions

LINE = "padfree-patch: GPTNeoXForCausalLM (gpt_neox) patched, backend {}, verified on cpu\n"


def neox():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = GPTNeoXConfig(
        vocab_size=97, max_position_embeddings=64, attention_dropout=0.0, hidden_dropout=0.0, **sizes
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def door():
    with autopatch() as handle:
        yield handle


def assert_exact(model, alone):
    with torch.no_grad():
        packed = model.eval()(**pack(examples((5, 4)))).logits
        expected = torch.cat([alone(input_ids=each).logits for each in examples((5, 4))], dim=1)
    assert (packed - expected).abs().max() < 2e-5 * expected.abs().max()


def test_trainer_verifies_it_and_packed_rows_are_exact(capfd, tmp_path):
    alone = neox().eval()
    with autopatch() as door:
        model = neox()
        assert door.models == [model] and lines(capfd) == []
        trainer_of(model, tmp_path, flattening(), max_steps=1, learning_rate=0.0).train()
    said = lines(capfd)
    assert said in ([LINE.format("sdpa")], [LINE.format("upstream's own, per sequence")])
    assert_exact(model, alone)


def test_a_loop_of_its_own_verifies_it_in_its_first_packed_call(door, capfd):
    model = neox()
    twin = copy.deepcopy(model)  # as a reference model, which is never trained
    model.train()(**pack(examples((5, 4))))
    assert len(lines(capfd)) == 1
    with torch.no_grad():
        twin.eval()(**pack(examples((5, 4))))
    assert len(lines(capfd)) == 1
    with torch.no_grad():
        twin(**pack(examples((5, 4))))
    assert lines(capfd) == []


def test_what_the_user_applies_keeps_its_choice_of_logits(door, tmp_path):
    model = padfree_patch.apply(neox(), logits="labelled")
    trainer_of(model, tmp_path, flattening(), max_steps=1).train()
    assert {each.logits for each in OptIn.all_in(model).values()} == {"labelled"}


def test_a_registered_model_that_is_entered_in_a_way_is_so_here_too(door, capfd, monkeypatch):
    """As Llama 4 and GPT-OSS are, which not every version has."""
    patch = dataclasses.replace(registry().get("llama"), any_decoder=True)
    for module in (deferred, patching):
        monkeypatch.setattr(module, "patch_for", lambda model: patch)
    model = made().train()
    assert patching.way_of(model)
    model(**pack(examples((5, 4))))
    assert lines(capfd)[0].startswith("padfree-patch: LlamaForCausalLM (llama) patched, backend")


def no_way(model, before, backend, *, verify):
    raise PadfreeError("no patch is registered for it, and no way that was found keeps its examples apart")


def leaks(model, before, backend, *, verify):
    raise LeakError("its examples mix")


def test_what_no_way_serves_is_left_alone_and_its_packed_rows_are_an_error(door, capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(patching, "apply_found", no_way)
    model = neox()
    with pytest.raises(PadfreeError, match="GPTNeoXForCausalLM was left unpatched, and is now trained on a packed"):
        trainer_of(model, tmp_path, flattening(), max_steps=1).train()
    assert not patching.is_applied(model)
    trainer_of(model, tmp_path, padding, max_steps=1).train()
    (line,) = lines(capfd)
    assert "(gpt_neox) is left unpatched: no patch is registered for it, and no way" in line


def test_without_a_trainer_packed_rows_of_what_no_way_serves_may_be_allowed(capfd, monkeypatch):
    """Then they are what the unpatched model makes of them; the control is the next test."""
    row, alone = pack(examples((5, 4))), neox().train()
    with autopatch(strict=False):
        model, twin = neox().train(), neox().train()
    monkeypatch.setattr(patching, "apply_found", no_way)
    with pytest.warns(UserWarning, match="GPTNeoXForCausalLM was left unpatched, and is now trained on a packed row"):
        logits = model(**row).logits
    assert torch.equal(logits, alone(**row).logits) and not patching.is_applied(model)
    (line,) = lines(capfd)
    assert "(gpt_neox) is left unpatched: no patch is registered for it, and no way" in line
    monkeypatch.setattr(patching, "apply_found", leaks)
    with pytest.raises(LeakError):
        twin(**row)


def test_without_a_trainer_what_no_way_serves_stops_at_its_first_packed_row(door, monkeypatch):
    model = neox().train()
    monkeypatch.setattr(patching, "apply_found", no_way)
    for _ in range(2):
        with pytest.raises(PadfreeError, match="no way that was found keeps its examples apart"):
            model(**pack(examples((5, 4))))
    model(input_ids=examples((5,))[0])
