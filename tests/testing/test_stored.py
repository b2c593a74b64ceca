"""Copies of tiny models: the same weights and the same sharing, and no other trace of the first."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from padfree_patch import autopatch
from padfree_patch.patching import is_applied
from padfree_patch.registry import registry
from padfree_patch.testing import tiny_model
from padfree_patch.testing.stored import Stored


def test_models_of_one_seed_are_equal_and_apart():
    first, second = (tiny_model(registry().get("llama")) for _ in range(2))
    other = tiny_model(registry().get("llama"), seed=1)
    for name, parameter in first.named_parameters():
        torch.testing.assert_close(parameter, second.get_parameter(name), rtol=0, atol=0)
        assert parameter.data_ptr() != second.get_parameter(name).data_ptr()
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    first.config.hidden_size = 0
    assert second.config.hidden_size and tiny_model(registry().get("llama")).config.hidden_size


def test_what_is_asked_for_is_what_comes():
    """Also where another model of the same architecture was made before."""
    patch = registry().get("llama")
    assert tiny_model(patch, num_hidden_layers=1).config.num_hidden_layers == 1
    assert len(tiny_model(patch).model.layers) == 3
    torch.set_default_dtype(torch.float64)
    try:
        assert tiny_model(patch).lm_head.weight.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


class Sharing(nn.Module):
    """Two layers with one weight, and a buffer that is a part of another."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.two.weight = self.one.weight
        self.register_buffer("whole", torch.arange(4.0))
        self.register_buffer("part", self.whole[1:3])


@pytest.mark.parametrize("with_lambda", [False, True], ids=["pickled", "deepcopied"])
def test_copy_shares_what_the_model_shares(with_lambda):
    model = Sharing()
    model.act = (lambda x: x) if with_lambda else nn.Identity()
    stored = Stored(model)
    expected = copy.deepcopy(model.one.weight)
    with torch.no_grad():
        model.one.weight.zero_()  # later changes are not the stored one's
        stored().one.weight.zero_()
    found = stored()
    assert found.one.weight is found.two.weight
    torch.testing.assert_close(found.one.weight, expected, rtol=0, atol=0)
    found.whole[1] = 9
    assert found.part[0] == 9


def test_models_of_an_open_door_are_that_doors_and_leave_no_trace():
    """Else every later test would have had a patched one."""
    patch, asked = registry().get("llama"), {"num_hidden_layers": 2, "seed": 7}
    for _ in range(2):
        with autopatch() as door:
            made = [tiny_model(patch, **asked) for _ in range(2)]
        assert door.models == made and all(map(is_applied, made))
        later = tiny_model(patch, **asked)
        assert not is_applied(later) and not any(each._forward_pre_hooks for each in later.modules())
