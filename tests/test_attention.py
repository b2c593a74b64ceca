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
from padfree_patch.attention import Needs, cpu, flash_attn, sdpa

LENGTHS = (5, 1, 17, 130, 3)
LONG = (1, 64, 129, 192, 193, 300, 2, 2049)
"""Both sides of every length at which the CPU's own way changes."""


def reference(q, k, v, sequences, *, scale, window=0, softcap=0.0):
    """Masked softmax attention, sequence by sequence, in float64: q (T, H, D), k and v (T, K, D)."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    outputs = []
    for q_, k_, v_ in zip(*(x.double().split(list(sequences.lengths)) for x in (q, k, v))):
        scores = torch.einsum("qhd,khd->hqk", q_, k_) * scale
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        distance = torch.arange(len(q_))[:, None] - torch.arange(len(q_))
        hidden = (distance < 0) | (distance >= (window or len(q_)))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v_))
    return torch.cat(outputs)


def random_qkv(heads=6, key_heads=2, head_dim=8, *, lengths=LENGTHS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), count, head_dim) for count in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def errors(qkv, sequences, *, attend=sdpa.attend, **options):
    """Of the output and the three gradients against float64: norm of the error over the norm of what it should be."""
    output = attend(*qkv, sequences, **options)
    assert output.dtype == qkv[0].dtype
    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = reference(*exact, sequences, **options)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    found = (output, *torch.autograd.grad(output, qkv, weights))
    wanted = (expected, *torch.autograd.grad(expected, exact, weights.double()))
    return [float((one.double() - other).detach().norm() / other.detach().norm()) for one, other in zip(found, wanted)]


@pytest.fixture(params=["cpu operators", "public function"])
def either_way(request, monkeypatch):
    """The sdpa backend with and without what is private to PyTorch on the CPU."""
    if request.param == "public function":
        monkeypatch.setattr(cpu, "works", lambda: False)
    else:
        assert cpu.works()


@pytest.mark.parametrize("window", [0, 1, 4, 100, 1000])
@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("scale", [8**-0.5, 1.0])
def test_sdpa_equals_float64(either_way, window, key_heads, scale):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("window", [0, 10, 65, 192, 1500])
def test_every_chunking_equals_float64(dtype, softcap, window):
    sequences = PackedSequences.from_lengths(LONG)
    options = {"scale": 0.35, "window": window, "softcap": softcap}
    assert max(errors(random_qkv(4, 2, lengths=LONG, dtype=dtype), sequences, **options)) < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [0.35, 1.5])
@pytest.mark.parametrize("options", [{}, {"window": 65}, {"softcap": 2.0}], ids=str)
def test_half_precision_is_as_exact_as_pytorchs_own(monkeypatch, dtype, scale, options):
    """Bound: 1.5 times what the public function, or float32 with rounded results, gets wrong itself."""
    sequences = PackedSequences.from_lengths(LONG)
    found = errors(random_qkv(4, 2, 64, lengths=LONG, dtype=dtype), sequences, scale=scale, **options)
    bounds = [torch.finfo(dtype).eps] * 4
    if not options:
        monkeypatch.setattr(cpu, "works", lambda: False)
        bounds = errors(random_qkv(4, 2, 64, lengths=LONG, dtype=dtype), sequences, scale=scale)
    assert all(error < 1.5 * bound for error, bound in zip(found, bounds)), (found, bounds)


def test_bfloat16_scores_are_not_rounded(monkeypatch):
    """The control of the test before: scores rounded to bfloat16, as in a plain product, are over that bound."""

    def without_lower_halves(x):
        return x.bfloat16()[..., None], torch.zeros_like(x.bfloat16()[..., None])

    sequences = PackedSequences.from_lengths(LONG)
    qkv = random_qkv(4, 2, 64, lengths=LONG, dtype=torch.bfloat16)
    right = errors(qkv, sequences, scale=1.5)
    monkeypatch.setattr(cpu, "_halves", without_lower_halves)
    assert max(errors(qkv, sequences, scale=1.5)) > 3 * max(right)


def test_neighbours_change_nothing_in_any_bit(either_way):
    sequences = PackedSequences.from_lengths(LONG)
    qkv = random_qkv(4, 2, lengths=LONG)
    before = sdpa.attend(*qkv, sequences, scale=0.3)
    with torch.no_grad():
        for x in qkv:
            x[: sum(LONG[:3])].normal_()
    assert torch.equal(sdpa.attend(*qkv, sequences, scale=0.3)[sum(LONG[:3]) :], before[sum(LONG[:3]) :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_memory_layout_will_do(dtype):
    sequences = PackedSequences.from_lengths(LONG)
    qkv = random_qkv(4, 2, lengths=LONG, dtype=dtype)
    expected = sdpa.attend(*qkv, sequences, scale=0.3)
    gradients = torch.autograd.grad(expected.sum(), qkv)  # of stride 0 in every dimension
    odd = [x.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_() for x in qkv]
    output = sdpa.attend(*odd, sequences, scale=0.3)
    assert torch.equal(output, expected)
    for found, wanted in zip(torch.autograd.grad(output.sum(), odd), gradients):
        assert torch.equal(found, wanted)


def test_one_autograd_node_whatever_the_number_of_sequences(monkeypatch):
    def inputs_of_the_last_node():
        output = sdpa.attend(*random_qkv(), PackedSequences.from_lengths(LENGTHS), scale=1.0)
        return {type(node).__name__ for node, _ in output.grad_fn.next_functions}

    assert inputs_of_the_last_node() == {"AccumulateGrad"}
    monkeypatch.setattr(cpu, "works", lambda: False)  # the control
    assert inputs_of_the_last_node() != {"AccumulateGrad"}


@pytest.mark.parametrize("replaced", ["_flash_forward", "_flash_backward"])
@pytest.mark.parametrize("how", ["missing", "wrong"])
def test_private_operators_that_changed_are_not_used(monkeypatch, replaced, how):
    operator = getattr(cpu, replaced)

    def changed(*args, **kwargs):
        if how == "missing":
            raise AttributeError("no such operator")
        return tuple(x + 0.01 for x in operator(*args, **kwargs))

    monkeypatch.setattr(cpu, replaced, changed)
    assert not cpu.works.__wrapped__()
    assert cpu.works()


def test_sdpa_without_grouped_queries_expands_the_keys(monkeypatch):
    monkeypatch.setattr(cpu, "works", lambda: False)
    sequences = PackedSequences.from_lengths(LENGTHS)
    qkv = random_qkv()
    expected = sdpa.attend(*qkv, sequences, scale=1.0)
    monkeypatch.setattr(sdpa, "_has_grouped_queries", lambda: False)
    torch.testing.assert_close(sdpa.attend(*qkv, sequences, scale=1.0), expected)


@pytest.mark.parametrize("options", [{}, {"window": 50}, {"softcap": 5.0}], ids=str)
def test_sdpa_drops_weights_at_the_given_rate(options):
    sequences = PackedSequences.from_lengths([400])
    q, k = torch.zeros(2, 400, 1, 8)
    v = torch.ones(400, 1, 8)
    torch.manual_seed(0)
    output = sdpa.attend(q, k, v, sequences, scale=1.0, dropout=0.5, **options)  # of kept weights, each doubled
    assert output[50:].mean().item() == pytest.approx(1, abs=0.1)
    assert output.std() > 0.01


@pytest.mark.parametrize("options", [{}, {"window": 50}, {"softcap": 2.0}], ids=str)
def test_the_backward_drops_what_the_forward_dropped(options):
    """Though it computes the weights anew: the output is linear in v, so v times its gradient adds up to it."""
    sequences = PackedSequences.from_lengths([100])
    q, k, v = random_qkv(2, 2, lengths=[100])
    output = sdpa.attend(q, k, v, sequences, scale=1.0, dropout=0.5, **options)
    (of_v,) = torch.autograd.grad(output.sum(), [v])
    torch.testing.assert_close((of_v * v).sum(), output.sum())


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"dropout": 0.1}], ids=str)
def test_no_scores_are_kept_for_the_backward(options):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        sdpa.attend(*random_qkv(2, 2, lengths=[2048]), PackedSequences.from_lengths([2048]), scale=1.0, **options)
    assert max(sizes) <= 256 * 2048  # the mask of one chunk


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


def test_a_backend_that_cannot_lists_every_candidate_with_its_reason():
    with pytest.raises(PadfreeError) as caught:
        attention.select(Needs("cpu", torch.float32, 64, window=128, softcap=30.0), "flash_attn")
    assert "backend 'flash_attn' can't serve dtype=float32, device=cpu, head_dim=64, window=128, softcap=30.0" in str(
        caught.value
    )
    for backend in attention.BACKENDS:
        assert f"  {backend.NAME}: " in str(caught.value)
    assert "  sdpa: works" in str(caught.value)
