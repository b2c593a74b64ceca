"""The sdpa backend, and its way on the CPU: right against float64 attention written out, with every option."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from helpers.attention_reference import LENGTHS, LONG, errors, random_qkv, reference
from padfree_patch import PackedSequences, versions
from padfree_patch.attention import bfloat16_backward, cpu, sdpa


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
    """The control of the test before: scores rounded to bfloat16, as in a plain product, exceed that bound."""

    def first_part_alone(x, dtype):
        return torch.nn.functional.pad(x.to(dtype)[..., None], (0, 2))

    sequences = PackedSequences.from_lengths(LONG)
    qkv = random_qkv(4, 2, 64, lengths=LONG, dtype=torch.bfloat16)
    right = errors(qkv, sequences, scale=1.5)
    monkeypatch.setattr(bfloat16_backward, "parts_of", first_part_alone)
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
def test_memory_layout_changes_no_bit(dtype):
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


@pytest.mark.parametrize("replaced", ["flash_forward", "flash_backward"])
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


def as_in_torch_2_4(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """The public function before it knew keys that query heads share."""
    assert q.shape[1] == k.shape[1]
    return torch.ops.aten.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)


def test_sdpa_before_torch_2_5_repeats_the_keys(monkeypatch):
    monkeypatch.setattr(cpu, "works", lambda: False)
    sequences = PackedSequences.from_lengths(LENGTHS)
    qkv = random_qkv()
    expected = sdpa.attend(*qkv, sequences, scale=1.0)
    monkeypatch.setattr(versions, "torch", lambda specifier: specifier != ">=2.5")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", as_in_torch_2_4)
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
    """The backward computes the weights again. As the output is linear in v, v times its gradient adds up to it."""
    sequences = PackedSequences.from_lengths([100])
    q, k, v = random_qkv(2, 2, lengths=[100])
    output = sdpa.attend(q, k, v, sequences, scale=1.0, dropout=0.5, **options)
    (dv,) = torch.autograd.grad(output.sum(), [v])
    torch.testing.assert_close((dv * v).sum(), output.sum())


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"dropout": 0.1}], ids=str)
def test_no_scores_are_kept_for_the_backward(options):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        sdpa.attend(*random_qkv(2, 2, lengths=[2048]), PackedSequences.from_lengths([2048]), scale=1.0, **options)
    assert max(sizes) <= 256 * 2048  # the mask of one chunk


@pytest.mark.parametrize("wanted", [True, False])
def test_no_plan_of_cudnn_for_every_length(monkeypatch, wanted):
    """cuDNN, which torch prefers on Hopper, made a step of the sdpa backend 25 times as slow on an H200."""
    enabled = []

    def function(q, *_, **__):
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", function)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(wanted)
    try:
        with FakeTensorMode():
            q = torch.empty(14, 4, 16, device="cuda")
            sdpa.attend(q, q, q, PackedSequences.from_lengths((5, 9)), scale=0.3)
        assert enabled == [False, False]
        assert torch.backends.cuda.cudnn_sdp_enabled() == wanted  # as the user left it
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_cudnn_stays_where_the_user_allows_nothing_else(monkeypatch):
    enabled = []

    def function(q, *_, **__):
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", function)
    with FakeTensorMode(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        q = torch.empty(14, 4, 16, device="cuda")
        sdpa.attend(q, q, q, PackedSequences.from_lengths((5, 9)), scale=0.3)
    assert enabled == [True, True]
