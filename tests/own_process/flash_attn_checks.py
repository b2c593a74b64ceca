"""The real flash-attn package, on its own CPU-runnable kernels: `nox -s flash_attn`, not part of the ordinary tests.

flash-attn 2.8.3 carries Triton kernels beside its CUDA ones, and Triton can interpret them on the CPU. Nothing of the
package is replaced but that its operators are registered for CUDA only. Limits of these kernels: they ignore sliding
windows, and in bfloat16 the interpreter overflows, so neither is tested here; and their backward is wrong for tensors
of different memory layouts. Our backend sees to that itself; for the dense kernel, the oracle, it is done here.
"""

from __future__ import annotations

import functools
import inspect
import os

import pytest
import torch

from helpers import holes

for name in ("FLASH_ATTENTION_TRITON_AMD_ENABLE", "TRITON_INTERPRET"):
    assert name in os.environ, f"{name} must be set before anything imports Triton; nox -s flash_attn does"

_custom_op = torch.library.custom_op


@functools.wraps(_custom_op)
def _for_every_device(*args, device_types=None, **kwargs):
    return _custom_op(*args, **kwargs)


torch.library.custom_op = _for_every_device
import flash_attn

torch.library.custom_op = _custom_op

_dense = flash_attn.flash_attn_func


@functools.wraps(_dense)
def _dense_of_one_layout(q, k, v, *args, **kwargs):
    output = _dense(q.contiguous(), k.contiguous(), v.contiguous(), *args, **kwargs)
    if output.requires_grad:
        output.register_hook(torch.Tensor.contiguous)
    return output


flash_attn.flash_attn_func = _dense_of_one_layout

from helpers import flash_attention_here

flash_attention_here.pretend()

from padfree_patch import PackedSequences, applied
from padfree_patch.attention import Needs, flash_family, sdpa, select
from padfree_patch.attention import flash_attn as backend
from padfree_patch.registry import registry
from padfree_patch.testing import Unavailable, conformance, examples, pack, tiny_model

LENGTHS = (5, 17, 1, 40)


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The real varlen function's calls, as bound arguments; and the backend that lets it have CPU tensors."""
    monkeypatch.setattr(flash_family, "DEVICES", ("cpu",))
    monkeypatch.setattr(flash_family, "DTYPES", (torch.float16, torch.float32))
    select.cache_clear()
    seen = []
    real = flash_attn.flash_attn_varlen_func
    signature = inspect.signature(real)

    @functools.wraps(real)
    def varlen(*args, **kwargs):
        seen.append(signature.bind(*args, **kwargs).arguments)
        return real(*args, **kwargs)

    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", varlen)
    yield seen
    select.cache_clear()


def random_qkv(dtype, key_heads, head_dim):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(LENGTHS), heads, head_dim) for heads in (4, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


# Relative Frobenius errors against float64: a few eps of the dtype, as the kernels add in blocks.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3)], ids=str)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [32, 20, 8])  # 20 and 8 are padded inside
@pytest.mark.parametrize("scale", [None, 1.0])
def test_backend_equals_float64(calls, dtype, tolerance, key_heads, head_dim, scale):
    sequences = PackedSequences.from_lengths(LENGTHS)
    scale = head_dim**-0.5 if scale is None else scale
    qkv = random_qkv(dtype, key_heads, head_dim)
    output = backend.attend(*qkv, sequences, scale=scale)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = sdpa.attend(*exact, sequences, scale=scale)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((output * weights).sum(), qkv)
    wanted = torch.autograd.grad((expected * weights).sum(), exact)
    for one, other in zip((output, *found), (expected, *wanted)):
        assert (one.double() - other).norm() < tolerance * other.norm()
    (call,) = calls
    assert call["cu_seqlens_q"].dtype == torch.int32 and call["cu_seqlens_q"] is call["cu_seqlens_k"]
    assert type(call["max_seqlen_q"]) is int and call["max_seqlen_q"] == call["max_seqlen_k"] == max(LENGTHS)
    assert call["causal"] and call["softmax_scale"] == scale


@pytest.mark.parametrize("layouts", ["THD THD THD HTD", "HTD HTD THD THD", "HTD HTD THD HTD"])
def test_gradients_are_right_whatever_the_memory_layouts(layouts):
    """As they do behind partial rotaries. The control: the package by itself gives wrong gradients, silently."""
    sequences = PackedSequences.from_lengths(LENGTHS)
    *inputs, of_gradient = layouts.split()

    def laid_out(x, layout):
        return x if layout == "THD" else x.transpose(0, 1).contiguous().transpose(0, 1)

    qkv = [laid_out(x.detach(), layout).requires_grad_() for x, layout in zip(random_qkv(torch.float32, 4, 8), inputs)]
    weights = laid_out(torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1)), of_gradient)

    def gradients(output, leaves):
        return torch.autograd.grad(output, leaves, grad_outputs=weights.to(output.dtype))

    exact = [x.detach().double().requires_grad_() for x in qkv]
    wanted = gradients(sdpa.attend(*exact, sequences, scale=0.3), exact)
    lengths = (sequences.cu_seqlens, sequences.cu_seqlens, max(LENGTHS), max(LENGTHS))
    ours = gradients(backend.attend(*qkv, sequences, scale=0.3), qkv)
    packages = gradients(flash_attn.flash_attn_varlen_func(*qkv, *lengths, softmax_scale=0.3, causal=True), qkv)
    errors = [
        max(float((one - other).norm() / other.norm()) for one, other in zip(found, wanted))
        for found in (ours, packages)
    ]
    assert errors[0] < 1e-6 and errors[1] > 0.1, errors


def test_options_are_passed_only_when_asked_for_and_as_the_package_wants_them(calls):
    sequences = PackedSequences.from_lengths(LENGTHS)
    qkv = random_qkv(torch.float32, 2, 8)
    backend.attend(*qkv, sequences, scale=1.0)
    assert "window_size" not in calls[0] and "softcap" not in calls[0]
    backend.attend(*qkv, sequences, scale=1.0, window=4, dropout=0.25)
    assert calls[1]["window_size"] == (3, 0) and calls[1]["dropout_p"] == 0.25
    takes = inspect.signature(flash_attn.flash_attn_varlen_func).parameters
    assert {"softcap", "window_size"} <= set(takes)


MODELS = [(patch, "flash_attention_2", {}) for patch in registry().patches()]
MODELS += [(registry().get("llama"), "flash_attention_2", {"hidden_size": 60})]  # heads of 10, which are padded
MODELS += [(registry().get("llama"), "sdpa", {})]


@pytest.mark.parametrize("check", [conformance.check_logits, conformance.check_gradients, conformance.check_isolation])
@pytest.mark.parametrize(
    ("patch", "implementation", "config"), MODELS, ids=lambda value: getattr(value, "model_type", str(value))
)
def test_model_on_the_real_package_is_exact(calls, check, implementation, patch, config):
    """The oracle runs each example alone, on flash_attention_2 through the real dense kernel."""

    def make():
        return tiny_model(patch, implementation, num_hidden_layers=1, **config)  # each kernel call takes a second

    try:
        model = make()
    except Unavailable as reason:
        pytest.skip(str(reason))
    del model
    check(make)
    packed = [call for call in calls if len(call["cu_seqlens_q"]) > 2]
    assert packed, "the packed row did not reach flash-attn's varlen kernel"


def test_unpatched_model_is_wrong_on_the_real_package_too():
    """The control, with the one row that upstream cuts in the wrong place in every version."""
    make = functools.partial(tiny_model, registry().get("llama"), "flash_attention_2", num_hidden_layers=1)
    assert holes.is_open(make, holes.start_elsewhere)
    with applied(make()) as model:
        assert holes.error_of(make, model, holes.start_elsewhere) < conformance.LOGIT_TOLERANCE


def test_alibi_that_upstream_refuses_is_exact(calls):
    falcon, sequences = registry().get("falcon"), examples((5, 9, 1, 12))
    try:
        tiny_model(falcon, "sdpa", alibi=True)
        other = "sdpa"
    except Unavailable:
        other = "eager"
    expected = conformance.logits_alone(lambda: tiny_model(falcon, other, alibi=True), sequences)
    model = tiny_model(falcon, "flash_attention_2", alibi=True)
    with torch.no_grad(), pytest.raises(ValueError, match="alibi"):
        model(input_ids=sequences[0])
    with applied(model), torch.no_grad():
        found = model(**pack(sequences)).logits
    assert calls
    assert conformance.largest(found - expected) < conformance.LOGIT_TOLERANCE * conformance.largest(expected)


def test_backend_is_selected_only_for_what_it_can_do():
    assert select(Needs("cpu", torch.float32, 64)).NAME == "flash_attn"
    assert select(Needs("cpu", torch.float32, 300)).NAME == "sdpa"
