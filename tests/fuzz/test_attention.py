"""The sdpa backend, with the CPU's own operators and without: output and gradients against float64."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.attention_reference import reference
from helpers.fuzzing import assert_found, bounded
from padfree_patch import PackedSequences
from padfree_patch.attention import cpu, sdpa

pytestmark = pytest.mark.fuzz

TURNS = (1, 2, 63, 64, 65, 128, 129, 130, 192, 193, 257)
"""Lengths and windows at which the way of computing changes."""

LAYOUTS = ("dense", "heads first", "reversed", "strided", "expanded")

ERRORS = {torch.float64: 1000, torch.float32: 200}
"""Largest errors in eps, of sums over up to 257 tokens and 40 channels; in half precision 4, rounded twice."""


@dataclasses.dataclass(frozen=True)
class Call:
    lengths: tuple[int, ...]
    heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    layout: str
    options: dict[str, float]
    operators: bool
    """Whether the CPU's own operators may be used."""


@st.composite
def calls(draw) -> Call:
    length = st.one_of(st.integers(1, 20), st.sampled_from(TURNS))
    lengths = tuple(draw(st.lists(length, min_size=1, max_size=5)))
    key_heads, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    window = draw(st.one_of(st.just(0), st.integers(1, 12), st.sampled_from(TURNS)))
    options = {"scale": draw(st.sampled_from([head_dim**-0.5, 0.05, 0.7])), "window": window}
    return Call(
        lengths,
        key_heads * draw(st.integers(1, 3)),
        key_heads,
        head_dim,
        draw(st.sampled_from([head_dim, head_dim, head_dim, 5])),
        draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])),
        draw(st.sampled_from(LAYOUTS)),
        {**options, "softcap": draw(st.sampled_from([0.0, 0.0, 0.5, 30.0]))},
        draw(st.booleans()),
    )


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Returns the values (T, heads, D) with other strides."""
    if layout == "heads first":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "reversed":
        x = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    elif layout == "strided":
        x = torch.stack([x, x + 1], -1)[..., 0]
    elif layout == "expanded":
        x = x[:, :1].expand(x.shape)
    return x.detach().requires_grad_()


def inputs(call: Call) -> list[Tensor]:
    generator, total = torch.Generator().manual_seed(0), sum(call.lengths)
    shapes = ((call.heads, call.head_dim), (call.key_heads, call.head_dim), (call.key_heads, call.value_dim))
    values = [torch.randn(total, *shape, generator=generator).to(call.dtype) for shape in shapes]
    return [laid_out(x, call.layout) for x in values]


def check(call: Call) -> None:
    sequences, qkv = PackedSequences.from_lengths(call.lengths), inputs(call)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    with nullcontext() if call.operators else mock.patch.object(cpu, "works", lambda: False):
        output = sdpa.attend(*qkv, sequences, **call.options)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
        found = (output, *torch.autograd.grad(output, qkv, weights))
    expected = reference(*exact, sequences, **call.options)
    wanted = (expected, *torch.autograd.grad(expected, exact, weights.double()))
    assert output.dtype == call.dtype
    bound = ERRORS.get(call.dtype, 4) * torch.finfo(call.dtype).eps
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        at_most = other.norm() + 0.1 * other.numel() ** 0.5  # a lone token's query has no gradient but rounding
        assert (one.double() - other).norm() <= bound * at_most


@bounded(120)
@given(calls())
def test_attention_equals_float64(call):
    check(call)


def test_a_window_that_is_off_by_one_is_found(monkeypatch):
    attend = sdpa.attend
    monkeypatch.setattr(sdpa, "attend", lambda *args, window=0, **options: attend(*args, window=window + 1, **options))
    assert_found(calls(), check)
