"""Where a training begins, its model is verified once, as it trains; a leak stops it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

import padfree_patch
from helpers.door import lines, made, tiny_config
from helpers.training import flattening, trained, trainer_of
from padfree_patch import LeakError, PadfreeError, autopatch, patching
from padfree_patch.testing import examples, pack

pytestmark = pytest.mark.versions

LINE = "padfree-patch: LlamaForCausalLM (llama) patched, backend sdpa, verified on cpu\n"


@pytest.fixture
def door():
    with autopatch() as handle:
        yield handle


def sum_over_row(module, args, output):
    return output + output.sum(1, keepdim=True)


def train(model, folder, **options):
    trainer = trainer_of(model, folder, flattening(), max_steps=2, **options)
    trainer.train()
    return [each["loss"] for each in trainer.state.log_history if "loss" in each]


def test_trainer_verifies_its_model_and_says_so_once(door, capfd, tmp_path):
    model = made()
    expected = trained(copy.deepcopy(model), tmp_path, flattening(), patched=True, max_steps=2).losses
    assert lines(capfd) == [LINE]  # of the copy, whose training begins
    assert train(model, tmp_path) == pytest.approx(expected, abs=1e-5)
    train(model, tmp_path)
    assert lines(capfd) == [LINE]


def test_without_the_door_the_same_training_is_another_one(tmp_path):
    """The control: before 5.0, or without the Trainer's switch of use_cache, upstream mixes."""
    model = LlamaForCausalLM(tiny_config())
    assert not padfree_patch.verify(model)


def test_a_loop_of_its_own_verifies_at_the_first_packed_training_call(door, capfd):
    model, batch = made().train(), pack(examples((5, 4)))
    model(input_ids=batch["input_ids"])  # not packed
    with torch.no_grad():
        model(**batch)
    assert lines(capfd) == []
    for _ in range(2):
        model(**batch)
    assert lines(capfd) == [LINE]


def test_a_leak_stops_the_training(door, tmp_path):
    model = made()
    model.model.layers[0].mlp.register_forward_hook(sum_over_row)
    for _ in range(2):
        with pytest.raises(LeakError, match="LlamaForCausalLM, which padfree_patch patched, does not isolate"):
            train(model, tmp_path)
    with pytest.raises(LeakError, match="training was stopped"):
        model.train()(**pack(examples((5, 4))))


def test_model_that_was_made_past_the_door_comes_through_it_when_its_training_begins(door, capfd, tmp_path):
    model = LlamaForCausalLM(tiny_config())
    train(model, tmp_path)
    assert door.models == [model] and lines(capfd) == [LINE]


def test_weights_that_are_not_there_yet_are_verified_later(door, capfd, tmp_path):
    model = made()
    weights = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():  # as on the ranks that wait for those of another
        torch.nn.init.constant_(parameter, float("nan"))
    trainer = trainer_of(model, tmp_path, flattening(), max_steps=1)
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    (line,) = lines(capfd)
    assert "patched, backend auto, not verified: its outputs are not finite" in line
    model.load_state_dict(weights)
    model.train()(**pack(examples((5, 4))))
    assert lines(capfd) == [LINE]


def test_weights_that_somebody_has_exchanged_for_tensors_are_not_verified(door, capfd):
    """As while FSDP runs a model: a backward through these tensors would be one of its own, in which all ranks meet."""
    model = made().train()
    tensors = {name: each * 1.0 for name, each in model.named_parameters()}
    for _ in range(2):
        torch.func.functional_call(model, tensors, kwargs=pack(examples((5, 4))))
    (line,) = lines(capfd)
    assert "patched, backend auto, not verified: tensors stand in the place of its weights" in line


def test_adapters_are_verified_with_their_model(door, capfd, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    model = peft.get_peft_model(made(), config)
    train(model, tmp_path)
    assert lines(capfd) == [LINE]
    model.add_adapter("later", copy.copy(config))
    model.set_adapter("later")
    model.get_submodule("base_model.model.lm_head.lora_A.later").register_forward_hook(sum_over_row)
    torch.nn.init.ones_(model.get_submodule("base_model.model.lm_head.lora_B.later").weight)
    with pytest.raises(LeakError, match="with LoraConfig, which came after"):
        model.train()(**pack(examples((5, 4))))


def test_adapters_that_cannot_serve_a_packed_row_stop_it(door, capfd, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(made(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(PadfreeError, match="puts virtual tokens before each row"):
        train(model, tmp_path)
    assert "patched, backend auto, not verified: PeftModelForCausalLM with PromptTuningConfig" in lines(capfd)[0]


def test_autocast_of_the_loop_is_that_of_the_check(door, capfd):
    dtypes, model = [], made().train()
    model.lm_head.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(**pack(examples((5, 4))))
    assert dtypes.count(torch.bfloat16) > 7
    assert lines(capfd) == [LINE]


def test_handle_that_is_removed_leaves_models_that_are_still_verified(capfd):
    with autopatch():
        model = made().train()
    model.model.layers[0].mlp.register_forward_hook(sum_over_row)
    with pytest.raises(LeakError):
        model(**pack(examples((5, 4))))


def test_a_model_that_the_user_patches_too_is_patched_once(door, capfd, tmp_path):
    model = padfree_patch.apply(made())
    train(model, tmp_path)
    assert lines(capfd) == [LINE]
    assert not patching.is_applied(padfree_patch.restore(model))
    train(model, tmp_path)  # who takes it off has it off
    assert not patching.is_applied(model)
