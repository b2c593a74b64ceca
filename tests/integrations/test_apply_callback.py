"""PaddingFreeCallback(apply=True): one argument, and the Trainer's model is patched and verified."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import BertConfig, BertForMaskedLM

from helpers.door import lines
from helpers.training import flattening, trained, trainer_of
from padfree_patch import LeakError, PaddingFreeCallback, PadfreeError, apply, patching, restore
from padfree_patch.wrapping.opt_in import OptIn

pytestmark = pytest.mark.versions

LINE = "padfree-patch: LlamaForCausalLM (llama) patched, backend sdpa, verified on cpu\n"


def losses(trainer):
    trainer.train()
    return [each["loss"] for each in trainer.state.log_history if "loss" in each]


@pytest.mark.parametrize("added", ["given", "later"])
def test_one_argument_patches_the_model_of_a_trainer(llama, tmp_path, capfd, added):
    expected = trained(llama, tmp_path, flattening(), patched=True).losses
    callback = PaddingFreeCallback(apply=True)
    trainer = trainer_of(llama, tmp_path, flattening(), callbacks=[callback] if added == "given" else [])
    assert patching.is_applied(llama) == (added == "given")
    if added == "later":
        trainer.add_callback(callback)
    capfd.readouterr()
    assert losses(trainer) == pytest.approx(expected, abs=1e-5)
    losses(trainer)
    assert lines(capfd) == [LINE]


def test_without_the_argument_a_packed_batch_is_an_error(llama, tmp_path):
    """The control."""
    trainer = trainer_of(llama, tmp_path, flattening(), callbacks=[PaddingFreeCallback()])
    with pytest.raises(PadfreeError, match=r"is not patched; call padfree_patch\.apply"):
        trainer.train()


def test_a_leak_stops_the_training(llama, tmp_path):
    llama.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out + out.sum(1, keepdim=True))
    trainer = trainer_of(llama, tmp_path, flattening(), callbacks=[PaddingFreeCallback(apply=True)])
    with pytest.raises(LeakError, match="does not isolate its examples; its training was stopped"):
        trainer.train()


def test_a_model_that_is_patched_already_keeps_its_backend_and_its_patch(llama, tmp_path):
    opt_in = OptIn.of(apply(llama, backend="sdpa"))
    losses(trainer_of(llama, tmp_path, flattening(), callbacks=[PaddingFreeCallback(apply=True)]))
    assert OptIn.of(llama) is opt_in and opt_in.backend == "sdpa"
    assert not patching.is_applied(restore(llama))


def test_what_apply_refuses_is_an_error(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForMaskedLM(BertConfig(vocab_size=90, **sizes))
    trainer = trainer_of(model, tmp_path, flattening(), callbacks=[PaddingFreeCallback(apply=True)])
    with pytest.raises(PadfreeError, match=r"BertForMaskedLM .* is not causal"):
        trainer.train()


@pytest.fixture
def precision_put_back(monkeypatch):
    """Takes back what training arguments with bf16 leave for every later training of the process."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_mixed_precision_is_that_of_the_check(llama, tmp_path, capfd, precision_put_back):
    dtypes = []
    llama.lm_head.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    trainer = trainer_of(
        copy.deepcopy(llama), tmp_path, flattening(), callbacks=[PaddingFreeCallback(apply=True)], bf16=True
    )
    if getattr(trainer, "use_cpu_amp", False):
        pytest.skip("on the CPU, this Trainer enters autocast around each loss itself")
    trainer.train()
    assert dtypes.count(torch.bfloat16) > 7
    assert lines(capfd) == [LINE]
