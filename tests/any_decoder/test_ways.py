"""Which classes of a model a way enters, and how."""

from __future__ import annotations

import functools
import importlib.util

import pytest
from torch import nn

from padfree_patch.any_decoder.way import ways_of
from padfree_patch.any_decoder.whole_row import with_kernels


class Mixer(nn.Module):
    def forward(self, hidden_states, attention_mask=None):
        return hidden_states


class KernelMixer(Mixer):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return causal_conv1d_fn(hidden_states, **kwargs)


class Indexer(Mixer):
    """Takes any keyword, and calls no kernel: in a short row it may choose every key, so that no check sees a leak."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return hidden_states


class Wrapped(Indexer):
    """Under the decorator of its method is no Python function."""

    @functools.wraps(abs)
    def helper(self, value):
        return abs(value)


class Block(nn.Module):
    """As NemotronH's: around a mixer, or an MLP that needs no mask."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states, attention_mask=None):
        return self.inner(hidden_states)


def causal_conv1d_fn(x, **kwargs):
    return x


def model_of(*inner: nn.Module) -> nn.Module:
    return nn.ModuleList([Block(each) for each in inner])


def test_a_block_around_a_mixer_is_not_cut():
    """Control: it is where no block holds anything that takes a mask."""
    assert ways_of(model_of(Mixer(), nn.Linear(2, 2)))[0].split == {Mixer}
    assert ways_of(model_of(nn.Linear(2, 2)))[0].split == {Block}


@pytest.mark.parametrize("installed", [False, True])
def test_only_mixers_that_call_kernels_are_told(monkeypatch, installed):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if installed else None)
    ways = ways_of(model_of(KernelMixer(), Indexer(), Mixer(), Wrapped()))
    found = with_kernels(ways)
    assert found[-len(ways) :] == ways
    assert [(way.whole, way.split) for way in found[: -len(ways)]] == [
        ({KernelMixer}, {Indexer, Mixer, Wrapped})
    ] * installed


def test_a_told_class_that_leaks_is_run_on_each_sequence_next(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    way = with_kernels(ways_of(model_of(KernelMixer(), Mixer())))[0]
    next_way = way.with_named(KernelMixer)
    assert (next_way.whole, next_way.split, next_way.named) == (frozenset(), {KernelMixer, Mixer}, frozenset())
    assert next_way.with_named(Mixer).named == {Mixer}
