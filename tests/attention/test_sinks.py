"""Sinks, one more logit of each head in every softmax: exact on the CPU, gradients too, and refused elsewhere."""

from __future__ import annotations

import pytest
import torch

from helpers.attention_reference import SHARED, random_qkv, reference
from padfree_patch import PackedSequences, PadfreeError, attention
from padfree_patch.attention import BACKENDS, Needs, cpu, sdpa
from padfree_patch.attention.per_sequence import working_dtype

HEADS = 4
LENGTHS = (1, 64, 129, 193, 300, 2)
"""Both sides of the lengths at which the CPU's own way changes."""


@pytest.fixture(params=["cpu operators", "public function"])
def either_way(request, monkeypatch):
    """The sdpa backend with and without what is private to PyTorch on the CPU."""
    if request.param == "public function":
        monkeypatch.setattr(cpu, "works", lambda: False)


def sinks_like(qkv):
    """Makes sinks (H,) as large as the scores that they stand beside, on which something depends."""
    return torch.tensor([-2.0, 0.5, 1.5, 4.0]).to(qkv[0].dtype).requires_grad_()


def errors(qkv, sequences, **options):
    """Measures the output and the gradients of q, k, v and sinks against float64: the norm of the error, relative."""
    weights = torch.randn(*qkv[0].shape[:2], qkv[2].shape[2], generator=torch.Generator().manual_seed(1))
    inputs = [*qkv, sinks_like(qkv)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    output = sdpa.attend(*inputs[:3], sequences, sinks=inputs[3], **options)
    expected = reference(*exact[:3], sequences, sinks=exact[3], **options)
    found = (output, *torch.autograd.grad(output, inputs, weights.to(output.dtype)))
    wanted = (expected, *torch.autograd.grad(expected, exact, weights.to(output.dtype).double()))
    assert [x.dtype for x in found] == [qkv[0].dtype] * 5
    return [float((one.double() - other).detach().norm() / other.detach().norm()) for one, other in zip(found, wanted)]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("key_heads", "window"), [(1, 0), (2, 0), (4, 0), (2, 1), (2, 65), (2, 250)])
def test_sdpa_equals_float64(either_way, key_heads, window, shared):
    sequences = PackedSequences.from_lengths(**(SHARED if shared else {"lengths": LENGTHS}))
    qkv = random_qkv(HEADS, key_heads, lengths=sequences.lengths)
    assert max(errors(qkv, sequences, scale=0.35, window=window)) < 100 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [0, 70])
def test_every_dtype_rounds_only_the_result(dtype, window):
    sequences = PackedSequences.from_lengths(LENGTHS)
    found = errors(
        random_qkv(HEADS, 2, 64, lengths=sequences.lengths, dtype=dtype), sequences, scale=0.2, window=window
    )
    assert max(found) < 1.5 * max(torch.finfo(dtype).eps, 100 * torch.finfo(working_dtype(dtype)).eps)


@pytest.mark.parametrize("of_values", [4, 12])
def test_values_may_have_another_size(either_way, of_values):
    sequences = PackedSequences.from_lengths((5, 140))
    q, k, _ = random_qkv(HEADS, 2, lengths=(5, 140))
    v = random_qkv(HEADS, 2, of_values, lengths=(5, 140))[2]
    assert max(errors([q, k, v], sequences, scale=0.3)) < 1e-5
    without = sdpa.attend(q, k, v, sequences, scale=0.3)
    torch.testing.assert_close(without, reference(q, k, v, sequences, scale=0.3).float())


def test_sinks_change_the_output():
    """The control of all tests here."""
    sequences = PackedSequences.from_lengths((5, 9))
    qkv = random_qkv(HEADS, 2, lengths=(5, 9))
    with_sinks, without = (reference(*qkv, sequences, scale=0.3, sinks=x) for x in (sinks_like(qkv), None))
    assert (with_sinks - without).norm() > 0.1 * without.norm()


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 2.0}, {"window": 3, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("lengths", [{"lengths": (5, 1, 4)}, {"lengths": (3, 2, 2), "prefixes": (-1, 0, 0)}], ids=str)
def test_second_derivatives_are_those_of_attention_written_out(options, lengths):
    sequences = PackedSequences.from_lengths(**lengths)

    def second(attend):
        qkv = random_qkv(HEADS, 2, 4, lengths=sequences.lengths, dtype=torch.float64)
        inputs = [*qkv, sinks_like(qkv)]
        loss = (qkv[0] + attend(*qkv, sequences, scale=0.4, sinks=inputs[3], **options)).square().sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        return [*first, *torch.autograd.grad(sum(x.square().sum() for x in first), inputs)]

    for found, expected in zip(second(sdpa.attend), second(reference), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning")  # torch.func's own
def test_torch_func_follows_sinks():
    sequences = PackedSequences.from_lengths((5, 4))
    qkv = [x.detach() for x in random_qkv(HEADS, 2, 4, lengths=(5, 4), dtype=torch.float64)]
    sinks = sinks_like(qkv).detach()

    def loss(attend):
        return lambda sinks: attend(*qkv, sequences, scale=0.4, sinks=sinks).square().sum()

    torch.testing.assert_close(*(torch.func.hessian(loss(attend))(sinks) for attend in (sdpa.attend, reference)))


def test_one_autograd_node_whatever_the_number_of_sequences():
    qkv = random_qkv(HEADS, 2)
    output = sdpa.attend(*qkv, PackedSequences.from_lengths((5, 1, 17, 130, 3)), scale=1.0, sinks=sinks_like(qkv))
    assert [type(node).__name__ for node, _ in output.grad_fn.next_functions] == ["AccumulateGrad"] * 4


def test_weights_are_dropped_beside_sinks():
    """All values are one: an output is what is kept of a softmax, of which half goes to the sink."""
    q, k = torch.zeros(2, 400, 1, 8)
    torch.manual_seed(0)
    sinks = torch.tensor([200.0]).log()
    output = sdpa.attend(
        q, k, torch.ones(400, 1, 8), PackedSequences.from_lengths([400]), scale=1.0, sinks=sinks, dropout=0.5
    )
    kept = torch.arange(1, 401) / torch.arange(201, 601)
    assert (output[100:, 0, 0] / kept[100:]).mean().item() == pytest.approx(1, abs=0.02)
    assert output.std() > 0.01


def test_only_the_cpu_computes_them_and_others_say_so():
    needs = Needs("cuda", torch.bfloat16, 64, sinks=True)
    assert attention.find(needs) is None
    with pytest.raises(
        PadfreeError, match=r"sinks=True:(\n.*)*flex: knows no sinks(\n.*)*sdpa: computes sinks on the CPU"
    ):
        attention.select(needs)
    assert [
        each.NAME for each in BACKENDS if attention.refusal(each, Needs("cpu", torch.bfloat16, 64, sinks=True)) is None
    ] == ["sdpa"]
