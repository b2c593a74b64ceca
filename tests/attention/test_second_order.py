"""Derivatives of derivatives of every backend: right, or an error, however somebody asks for them."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as torch_flex

from helpers.attention_reference import random_qkv, reference
from padfree_patch import PackedSequences, PadfreeError
from padfree_patch.attention import cpu, flash_attn, flash_attn_3, flex, sdpa, torch_varlen

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning"),  # torch.func's own
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
]

LENGTHS = (5, 1, 4)
SEQUENCES = PackedSequences.from_lengths(LENGTHS)
OPTIONS = [{}, {"window": 3}, {"softcap": 2.0}, {"softcap": 2.0, "window": 3}]


def loss(attend, **options):
    """Makes a function of q, k and v; as in a model, q also has a way around the attention."""
    return lambda q, k, v: (q + attend(q, k, v, SEQUENCES, scale=0.4, **options)).square().sum()


def qkv():
    return tuple(random_qkv(4, 2, 4, lengths=LENGTHS, dtype=torch.float64))


def vectors():
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in qkv())


def penalty(f, inputs):
    first = torch.autograd.grad(f(*inputs), inputs, create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in first), inputs)


def backward_twice(f, inputs):
    f(*inputs).backward(create_graph=True)
    first = [x.grad for x in inputs]
    for x in inputs:
        x.grad = None
    sum(x.square().sum() for x in first).backward()
    return [x.grad for x in inputs]


def backward_over_backward(f, inputs):
    return torch.autograd.functional.hvp(f, inputs, vectors())[1]


def many_vectors_at_once(f, inputs):
    hessian = torch.autograd.functional.hessian(f, inputs, vectorize=True)
    return [block for row in hessian for block in row]


def forward_over_backward(f, inputs):
    everything = (0, 1, 2)
    detached = tuple(x.detach() for x in inputs)
    return torch.func.jvp(torch.func.grad(f, everything), detached, vectors())[1]


def hessian_of_torch_func(f, inputs):
    hessian = torch.func.hessian(f, (0, 1, 2))(*(x.detach() for x in inputs))
    return [block for row in hessian for block in row]


def dual_numbers(f, inputs):
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(x, tangent) for x, tangent in zip(inputs, vectors())]
        gradients = torch.autograd.grad(f(*duals), duals, create_graph=True)
        return [torch.autograd.forward_ad.unpack_dual(x).tangent for x in gradients]


WAYS = [
    penalty,
    backward_twice,
    backward_over_backward,
    many_vectors_at_once,
    forward_over_backward,
    hessian_of_torch_func,
    dual_numbers,
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_second_derivatives_are_those_of_attention_written_out(way, options):
    found, wanted = (way(loss(attend, **options), qkv()) for attend in (sdpa.attend, reference))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "window": 2}], ids=str)
def test_second_derivatives_are_right_where_weights_are_dropped(options):
    def attend(q, k, v):
        torch.manual_seed(3)  # the same weights
        return sdpa.attend(q, k, v, PackedSequences.from_lengths((3,)), scale=0.4, dropout=0.4, **options)

    assert torch.autograd.gradgradcheck(attend, random_qkv(2, 1, 2, lengths=(3,), dtype=torch.float64))


@pytest.mark.parametrize("under_autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_that_have_gradients_are_no_coarser(dtype, under_autocast):
    inputs = random_qkv(4, 2, 16, lengths=LENGTHS, dtype=dtype)
    weights = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def gradients(attend, inputs, **options):
        output = attend(*inputs, SEQUENCES, scale=0.4)
        return torch.autograd.grad(output, inputs, weights.to(output.dtype), **options)

    exact = gradients(reference, [x.detach().double().requires_grad_() for x in inputs])
    with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):  # as a loop that leaves it on has it
        plain, found = (gradients(sdpa.attend, inputs, create_graph=create) for create in (False, True))
    for one, other, right in zip(found, plain, exact):
        assert one.dtype == dtype
        assert (one.double() - right).norm() < 1.1 * (other.double() - right).norm()


def test_public_function_says_that_it_has_none_unless_it_computes_with_matmuls(monkeypatch):
    """What the backend is without PyTorch's private operators, and on a GPU."""
    monkeypatch.setattr(cpu, "works", lambda: False)
    with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
        penalty(loss(sdpa.attend), qkv())
    with sdpa_kernel(SDPBackend.MATH):
        found = penalty(loss(sdpa.attend), qkv())
    for one, other in zip(found, penalty(loss(reference), qkv())):
        torch.testing.assert_close(one, other)


class HidesItsBackward(torch.autograd.Function):
    """Attention whose backward autograd can't see, as a kernel's: without a guard, its second derivatives are 0."""

    @staticmethod
    def forward(ctx, q, k, v, scale):
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        return reference(q, k, v, SEQUENCES, scale=scale).to(q.dtype)

    @staticmethod
    def backward(ctx, dout):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            out = reference(*inputs, SEQUENCES, scale=ctx.scale)
            return *torch.autograd.grad(out, inputs, dout), None


def as_flash_attn(q, k, v, *, softmax_scale, **options):
    return HidesItsBackward.apply(q, k, v, softmax_scale)


def as_torch_varlen(q, k, v, *, scale, **options):
    return HidesItsBackward.apply(q, k, v, scale)


@pytest.fixture(params=[flash_attn, flash_attn_3, torch_varlen, flex], ids=lambda backend: backend.NAME)
def kernel(request, monkeypatch):
    """A backend over a kernel that runs here."""
    package = types.SimpleNamespace(flash_attn_varlen_func=as_flash_attn)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    varlen = types.SimpleNamespace(varlen_attn=as_torch_varlen)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", varlen)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "compiled_flex_attention", lambda: torch_flex.flex_attention)
    return request.param


@pytest.mark.parametrize("way", [penalty, backward_twice, backward_over_backward], ids=lambda way: way.__name__)
def test_kernels_without_second_derivatives_are_an_error(kernel, way):
    with pytest.raises(PadfreeError, match=f"backend '{kernel.NAME}' has no second derivatives .* backend='sdpa'"):
        way(loss(kernel.attend), qkv())


def test_first_derivatives_of_kernels_are_no_error(kernel):
    inputs = [x.float().detach().requires_grad_() for x in qkv()]
    found, wanted = (torch.autograd.grad(loss(attend)(*inputs), inputs) for attend in (kernel.attend, reference))
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other)


def test_an_unguarded_kernel_gives_wrong_second_derivatives_in_silence():
    """The control of the tests before."""

    def unguarded(q, k, v, sequences, *, scale):
        return HidesItsBackward.apply(q, k, v, scale)

    (found, *_), (wanted, *_) = (penalty(loss(attend), qkv()) for attend in (unguarded, reference))
    assert (found - wanted).norm() > 0.1 * wanted.norm()


def test_no_gradient_of_what_follows_is_no_gradient_here():
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, gradient):
            return None

    inputs = qkv()
    output = sdpa.attend(*inputs, SEQUENCES, scale=0.4)
    assert torch.autograd.grad(Nothing.apply(output), inputs, allow_unused=True) == (None, None, None)
