"""The operator that stands for packed attention in a graph of torch.compile."""

from __future__ import annotations

import pytest
import torch

from helpers.attention_reference import reference
from padfree_patch import PackedSequences

graph = pytest.importorskip(
    "padfree_patch.seams.graph", reason="torch has no custom_op before 2.4", exc_type=ImportError
)

SEQUENCES = PackedSequences.from_lengths((5, 1, 17))


def tensors(of_values=8):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 6, 23, 8), (1, 2, 23, 8), (1, 2, 23, of_values)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("of_values", [8, 6], ids=["values like keys", "shorter values"])
def test_operator_is_attention(window, softcap, of_values):
    q, k, v = tensors(of_values)
    out = graph.attend(q, k, v, SEQUENCES.cu_seqlens, None, window, 0.3, softcap, 0.0, "auto")
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    expected = reference(*(x[0].transpose(0, 1) for x in exact), SEQUENCES, **options)
    torch.testing.assert_close(out[0].double(), expected, rtol=1e-5, atol=1e-5)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    for mine, its in zip(gradients, torch.autograd.grad(expected, exact, dout[0].double())):
        torch.testing.assert_close(mine.double(), its, rtol=1e-4, atol=1e-5)


def test_operators_backward_is_not_cast_by_autocast():
    q, k, v = tensors()
    dout = torch.randn(1, 23, 6, 8)
    gradients = []
    for enabled in (False, True):
        out = graph.attend(q, k, v, SEQUENCES.cu_seqlens, None, 4, 0.3, 1.5, 0.0, "auto")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(out, (q, k, v), dout))
    assert all(torch.equal(x, y) for x, y in zip(*gradients))


def test_dropout_of_the_backward_is_that_of_the_forward():
    """Attention is linear in the values, so values * their gradient is output * its gradient: of the same weights."""
    q, k, v = tensors()
    outs = []
    for seed in (1, 1, 2):
        before = torch.random.get_rng_state()
        out = graph.attend(q, k, v, SEQUENCES.cu_seqlens, torch.tensor(seed), 0, 0.3, 0.0, 0.5, "auto")
        dout = torch.ones_like(out)
        (dv,) = torch.autograd.grad(out, v, dout)
        assert torch.equal(torch.random.get_rng_state(), before)  # and nobody else draws other numbers for it
        torch.testing.assert_close((v * dv).sum(), (out * dout).sum(), rtol=1e-4, atol=1e-4)
        outs.append(out)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_operator_keeps_what_torch_compile_relies_on():
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        graph.attend, (*tensors(), SEQUENCES.cu_seqlens, None, 4, 0.3, 0.0, 0.0, "auto"), test_utils=quick
    )


def test_second_derivatives_are_an_error():
    q, k, v = tensors()
    out = graph.attend(q, k, v, SEQUENCES.cu_seqlens, None, 0, 0.3, 0.0, 0.0, "auto")
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no autograd formula|does not require grad|not implemented"):
        torch.autograd.grad(gradient.sum(), k)
