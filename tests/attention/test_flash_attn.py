"""The flash_attn backend against a stand-in for the package, and which backend is selected for what a call needs."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from pathlib import Path

import pytest
import torch

import helpers
from helpers.attention_reference import LENGTHS, random_qkv, reference
from padfree_patch import PackedSequences, PadfreeError, attention, versions
from padfree_patch.attention import Backend, Needs, flash_attn, sdpa


@pytest.mark.parametrize("backend", attention.BACKENDS, ids=lambda backend: backend.NAME)
def test_every_backend_has_the_signatures_of_the_protocol(backend):
    for name in ("attend", "refusal"):
        expected = list(inspect.signature(getattr(Backend, name)).parameters.values())[1:]  # without self
        assert list(inspect.signature(getattr(backend, name)).parameters.values()) == expected


@pytest.fixture
def recorded(monkeypatch):
    """The stand-in for flash-attn in place of the package, and a list of its varlen function's calls."""
    file = Path(helpers.__file__).with_name("stand_ins") / "flash_attn" / "__init__.py"
    spec = importlib.util.spec_from_file_location("flash_attn", file)
    package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    varlen, calls = package.flash_attn_varlen_func, []

    @functools.wraps(varlen)
    def recording(*args, **kwargs):
        calls.append(inspect.signature(varlen).bind(*args, **kwargs).arguments)
        return varlen(*args, **kwargs)

    package.flash_attn_varlen_func = recording
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    return calls


@pytest.mark.parametrize("window", [0, 4])
def test_flash_attn_gets_the_arguments_that_its_signature_names(recorded, window):
    sequences = PackedSequences.from_lengths(LENGTHS)
    qkv = random_qkv()
    output = flash_attn.attend(*qkv, sequences, scale=0.3, window=window)
    torch.testing.assert_close(output, reference(*qkv, sequences, scale=0.3, window=window).float())
    (call,) = recorded
    assert call["causal"] is True
    assert call["cu_seqlens_q"] is call["cu_seqlens_k"] and call["cu_seqlens_q"].dtype == torch.int32
    assert type(call["max_seqlen_q"]) is int and call["max_seqlen_q"] == call["max_seqlen_k"] == max(LENGTHS)
    assert call.get("window_size") == ((window - 1, 0) if window else None)


def test_flash_attn_refuses_what_its_backward_cannot_index():
    fits = PackedSequences.from_lengths([100] * 1000)
    flash_attn.check_int32_bound(fits, heads=32, head_dim=128)
    too_many = PackedSequences.from_lengths([4] * 4000)
    with pytest.raises(PadfreeError, match=r"4000 sequences of 16000 tokens with 32 heads of size 100 need 2162688000"):
        flash_attn.check_int32_bound(too_many, heads=32, head_dim=100)


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (Needs("cpu", torch.bfloat16, 64), "needs tensors on cuda, found cpu"),
        (Needs("cuda", torch.float32, 64), "needs float16 or bfloat16, found float32"),
        (Needs("cuda", torch.bfloat16, 512), "head size of at most 256, found 512"),
    ],
)
def test_flash_attn_refuses_with_the_reason(monkeypatch, needs, reason):
    monkeypatch.setattr(versions, "installed", lambda package: versions.Version("2.8.3"))
    assert reason in flash_attn.refusal(needs)


def test_auto_prefers_flash_attn_where_it_runs(recorded, monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda package: versions.Version("2.8.3"))
    attention.select.cache_clear()
    assert attention.select(Needs("cuda", torch.bfloat16, 64, window=7)) is flash_attn
    assert attention.select(Needs("cpu", torch.bfloat16, 64)) is sdpa
    attention.select.cache_clear()


def test_a_backend_that_cannot_lists_every_candidate_with_its_reason():
    with pytest.raises(PadfreeError) as caught:
        attention.select(Needs("cpu", torch.float32, 64, window=128, softcap=30.0), "flash_attn")
    assert "backend 'flash_attn' can't serve dtype=float32, device=cpu, head_dim=64, window=128, softcap=30.0" in str(
        caught.value
    )
    for backend in attention.BACKENDS:
        assert f"  {backend.NAME}: " in str(caught.value)
    assert "  sdpa: works" in str(caught.value)
