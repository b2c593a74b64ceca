"""What stands around a model and its layers, which apply must cope with or name."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

import padfree_patch
from helpers.models import assert_exact
from padfree_patch import PackedSequences, PadfreeError
from padfree_patch.testing import conformance, examples

pytestmark = pytest.mark.versions


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the forward without gradients
@pytest.mark.parametrize("kind", CheckpointImpl, ids=lambda kind: kind.name)
def test_layers_in_torchs_checkpoint_wrapper_are_no_obstacle(make, batch, alone, kind):
    """Reentrant ones refuse `torch.autograd.grad`: the check must do without."""
    model = make()
    model.model.layers = nn.ModuleList(checkpoint_wrapper(each, checkpoint_impl=kind) for each in model.model.layers)
    model.model.layers[0].requires_grad_(False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    padfree_patch.apply(model)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_exact(model, batch, alone)


@pytest.fixture
def _meta_is_the_default_device():
    """Strictest of all: nothing that is made there by mistake can be read."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def ways_to_say_where(sequences: PackedSequences) -> dict[str, dict[str, object]]:
    cu_seqlens = torch.tensor([0, 5, 14, 15, 27], dtype=torch.int32)
    assert sequences.cu_seqlens.tolist() == cu_seqlens.tolist()
    numbers = torch.repeat_interleave(torch.arange(4), torch.tensor(sequences.lengths))[None]
    return {
        "positions": {"position_ids": sequences.position_ids()[None]},
        "cu_seqlens": {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens},
        "segments": {"attention_mask": numbers + 1},
        "numbers": {"seq_idx": numbers.int(), "position_ids": sequences.position_ids()[None]},
        "sequences": {"packed_sequences": sequences},
    }


def test_default_device_other_than_the_models_is_no_obstacle(llama, batch, request):
    """Upstream's own mask of a sliding window fails there."""
    alone = conformance.logits_alone(lambda: copy.deepcopy(llama), examples(conformance.LENGTHS))
    model, sequences = llama, PackedSequences.from_position_ids(batch["position_ids"])
    ways = ways_to_say_where(sequences)
    request.getfixturevalue("_meta_is_the_default_device")
    padfree_patch.apply(model)
    for way in ways.values():
        assert_exact(model, {"input_ids": batch["input_ids"], **way}, alone)
    model(**batch, labels=batch["input_ids"]).loss.backward()


class Actor(nn.Module):
    """Takes other arguments than any transformers model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, sequences, positions=None):
        return self.model(sequences, position_ids=positions).logits.log_softmax(-1)


def test_model_inside_an_actor_is_patched_and_named(llama, batch):
    """No probe can call the actor itself; what it computes of packed rows is what it computes of each example alone."""
    actor = Actor(llama)
    with torch.no_grad():
        alone = torch.cat([actor(each) for each in examples(conformance.LENGTHS)], dim=1)
        says = r"Actor.forward takes sequences, positions, and no input_ids, so only the LlamaForCausalLM inside"
        with pytest.warns(UserWarning, match=says):
            padfree_patch.apply(actor)
        torch.testing.assert_close(actor(batch["input_ids"], batch["position_ids"]), alone)
    with pytest.raises(PadfreeError, match=r"Actor.forward takes .*on the transformers model inside it, .model$"):
        padfree_patch.verify(actor)
    assert not padfree_patch.patching.is_applied(padfree_patch.restore(actor))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        padfree_patch.apply(actor.model)


def test_a_leak_in_the_model_inside_an_actor_is_found(llama):
    llama.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output + output.roll(1, dims=1))
    with pytest.warns(UserWarning, match="inside it"), pytest.raises(padfree_patch.LeakError):
        padfree_patch.apply(Actor(llama))
    assert not padfree_patch.patching.is_applied(llama)
