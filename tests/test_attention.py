"""Backends: right against float64 attention written out, every option handled or refused with its reason."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from pathlib import Path

import pytest
import torch

from padfree_patch import PackedSequences, PadfreeError, attention, versions
from padfree_patch.attention import Needs, flash_attn, sdpa

LENGTHS = (5, 1, 17, 130, 3)


def reference(q, k, v, sequences, *, scale, window=0):
    """Masked softmax attention over the whole batch, in float64: q (T, H, D), k and v (T, K, D)."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    owner = torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor(sequences.lengths))
    distance = torch.arange(len(owner))[:, None] - torch.arange(len(owner))
    visible = (owner[:, None] == owner) & (distance >= 0) & (distance < (window or len(owner)))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def random_qkv(heads=6, key_heads=2, head_dim=8):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(LENGTHS), count, head_dim) for count in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("window", [0, 1, 4, 100, 1000])
@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("scale", [8**-0.5, 1.0])
def test_sdpa_equals_float64(window, key_heads, scale):
    sequences = PackedSequences.from_lengths(LENGTHS)
    qkv = random_qkv(key_heads=key_heads)
    output = sdpa.attend(*qkv, sequences, scale=scale, window=window)
    expected = reference(*qkv, sequences, scale=scale, window=window)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected.float())
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((output * weights).sum(), qkv)
    for gradient, wanted in zip(found, torch.autograd.grad((expected * weights).sum(), qkv)):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)  # sums over up to 130 float32 terms


def test_sdpa_without_grouped_queries_expands_the_keys(monkeypatch):
    sequences = PackedSequences.from_lengths(LENGTHS)
    qkv = random_qkv()
    expected = sdpa.attend(*qkv, sequences, scale=1.0)
    monkeypatch.setattr(sdpa, "_has_grouped_queries", lambda: False)
    torch.testing.assert_close(sdpa.attend(*qkv, sequences, scale=1.0), expected)


def test_sdpa_drops_weights_at_the_given_rate():
    sequences = PackedSequences.from_lengths([400])
    q, k = torch.zeros(2, 400, 1, 8)
    v = torch.ones(400, 1, 8)
    torch.manual_seed(0)
    output = sdpa.attend(q, k, v, sequences, scale=1.0, dropout=0.5)  # mean of kept weights, each doubled
    assert output[-1].mean().item() == pytest.approx(1, abs=0.2)
    assert output.std() > 0.01


@pytest.fixture
def recorded(monkeypatch):
    """The stand-in for flash-attn in place of the package, and a list of its varlen function's calls."""
    file = Path(__file__).with_name("stand_ins") / "flash_attn" / "__init__.py"
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
def test_flash_attn_is_called_as_its_signature_says(recorded, window):
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
def test_flash_attn_says_what_it_cannot(monkeypatch, needs, reason):
    monkeypatch.setattr(versions, "installed", lambda package: versions.Version("2.8.3"))
    assert reason in flash_attn.refusal(needs)


def test_auto_prefers_flash_attn_where_it_runs(recorded, monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda package: versions.Version("2.8.3"))
    attention.select.cache_clear()
    assert attention.select(Needs("cuda", torch.bfloat16, 64, window=7)) is flash_attn
    assert attention.select(Needs("cpu", torch.bfloat16, 64)) is sdpa
    attention.select.cache_clear()


def test_no_backend_lists_every_candidate_with_its_reason():
    with pytest.raises(PadfreeError) as caught:
        attention.select(Needs("cpu", torch.float32, 64, window=128, softcap=30.0))
    assert "no attention backend for dtype=float32, device=cpu, head_dim=64, window=128, softcap=30.0" in str(
        caught.value
    )
    for backend in attention.BACKENDS:
        assert f"  {backend.NAME}: " in str(caught.value)
    assert "scaled_dot_product_attention has no softcap" in str(caught.value)
