"""What the CPU computes in matrix products: softcap, dropout and a bias on keys, alone and together."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from helpers.attention_reference import SHARED, errors, random_qkv, reference
from padfree_patch import PackedSequences
from padfree_patch.attention import cpu_chunks, dropped, sdpa
from padfree_patch.attention.per_sequence import working_dtype

LENGTHS = (1, 63, 64, 65, 200)
"""Both sides of the length of a chunk."""
SINKS = torch.tensor([-1.0, 0.5, 2.0, 4.0])
MIXES = [
    {"softcap": 2.0},
    {"key_bias": True},
    {"key_bias": True, "softcap": 2.0, "window": 70},
    {"key_bias": True, "window": 10, "sinks": SINKS},
    {"softcap": 2.0, "sinks": SINKS},
]


@pytest.fixture(params=[2**18, 3000], ids=["heads together", "heads apart"])
def chunks(request, monkeypatch):
    """Chunks of all heads, and chunks of one or two, as long rows have them."""
    monkeypatch.setattr(cpu_chunks, "SCORES", request.param)


def options_of(mix, sequences):
    """Returns the options of a call, with a bias that differs between heads and grows along a sequence."""
    bias = torch.tensor([[0.5], [0.25], [-0.1], [1.0]]) * sequences.position_ids()
    return {"scale": 0.35, **mix, **({"key_bias": bias} if "key_bias" in mix else {})}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_products_equal_float64(chunks, mix, shared):
    sequences = PackedSequences.from_lengths(**(SHARED if shared else {"lengths": LENGTHS}))
    qkv = random_qkv(4, 2, lengths=sequences.lengths)
    assert max(errors(qkv, sequences, **options_of(mix, sequences))) < 100 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("mix", MIXES[:3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_rounds_only_the_result(mix, dtype):
    sequences = PackedSequences.from_lengths(LENGTHS)
    qkv = random_qkv(4, 2, 32, lengths=LENGTHS, dtype=dtype)
    bound = 1.5 * max(torch.finfo(dtype).eps, 100 * torch.finfo(working_dtype(dtype)).eps)
    with torch.autocast("cpu", torch.bfloat16):  # which must change nothing inside
        assert max(errors(qkv, sequences, **options_of(mix, sequences))) < bound


def test_a_bias_that_is_left_out_is_noticed():
    """The control."""
    sequences = PackedSequences.from_lengths(LENGTHS)
    options = options_of({"key_bias": True}, sequences)

    def without(*args, key_bias, **options):
        return sdpa.attend(*args, **options)

    assert min(errors(random_qkv(4, 2, lengths=LENGTHS), sequences, attend=without, **options)) > 0.1


def test_weights_too_small_for_float32_are_zero():
    """A steep bias makes most weights so; the processor would compute with some of them ten times as slowly."""
    sequences = PackedSequences.from_lengths((400,))
    bias = torch.tensor([[1.0], [2.0], [0.5], [0.1]]) * sequences.position_ids()
    qkv = random_qkv(4, 2, lengths=(400,))
    assert max(errors(qkv, sequences, scale=1.0, key_bias=bias)) < 1e-4  # float32 rounds scores of 800 by 3e-5


@pytest.mark.parametrize("mix", [{}, *MIXES], ids=str)
def test_backward_drops_what_the_forward_dropped(chunks, mix):
    """The gradients that autograd makes of the same attention written out are those of the backward."""
    sequences = PackedSequences.from_lengths(LENGTHS)
    qkv = random_qkv(4, 2, lengths=LENGTHS)
    weights = torch.randn(sum(LENGTHS), 4, 8, generator=torch.Generator().manual_seed(1))

    def outcome(seed=5, **how):
        torch.manual_seed(seed)
        output = sdpa.attend(*qkv, sequences, dropout=0.3, **options_of(mix, sequences))
        return output, *torch.autograd.grad(output, qkv, weights, **how)

    fast, written_out, other = outcome(), outcome(create_graph=True), outcome(seed=6)
    for one, same, another in zip(fast, written_out, other):
        assert (one - same).norm() < 1e-5 * same.norm()
        assert (one - another).norm() > 0.1 * one.norm()  # the control


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_each_weight_is_dropped_with_the_chance_that_is_asked_for(dropout):
    """Values are the rows of an identity, so an output is what is kept of the weights, which are all alike."""
    length, heads = 200, 4
    q, k = torch.zeros(2, length, heads, 8)
    v = torch.eye(length)[:, None].expand(-1, heads, -1)
    torch.manual_seed(0)
    first, second = (
        sdpa.attend(q, k, v, PackedSequences.from_lengths([length]), scale=1.0, dropout=dropout) for _ in range(2)
    )
    seen = torch.ones(length, length).tril()[:, None].expand(-1, heads, -1) > 0
    kept = (first > 0)[seen].float()
    spread = (dropout * (1 - dropout) / len(kept)) ** 0.5
    assert kept.mean().item() == pytest.approx(1 - dropout, abs=5 * spread)
    assert (first * torch.arange(1.0, length + 1)[:, None, None])[first > 0].mean().item() == pytest.approx(
        1 / (1 - dropout), rel=1e-4
    )
    alike = 1 - 2 * dropout * (1 - dropout)  # of two independent draws
    for one, other in ((first[:, 0], first[:, 1]), (first[1:, 0], first[:-1, 0]), (first[:, 0], second[:, 0])):
        both = torch.ones(one.shape[0], length).tril(-1) > 0
        assert ((one > 0) == (other > 0))[both].float().mean().item() == pytest.approx(alike, abs=0.03)


def test_everything_may_be_dropped():
    qkv = random_qkv(4, 2, lengths=(70,))
    output = sdpa.attend(*qkv, PackedSequences.from_lengths((70,)), scale=0.3, dropout=1.0)
    assert not output.any()
    assert not any(each.any() for each in torch.autograd.grad(output.sum(), qkv))


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_drops_the_same(reentrant):
    sequences = PackedSequences.from_lengths(LENGTHS)

    def outcome(around):
        torch.manual_seed(2)
        qkv = random_qkv(4, 2, lengths=LENGTHS)
        output = around(lambda *qkv: sdpa.attend(*qkv, sequences, scale=0.3, dropout=0.3), *qkv)
        after = torch.rand(())  # as a layer that draws afterwards
        return output, *torch.autograd.grad(output.square().sum() * after, qkv)

    def computed_again(function, *qkv):
        return checkpoint(function, *qkv, use_reentrant=reentrant)

    if reentrant:  # which takes no autograd.grad

        def backward(around):
            torch.manual_seed(2)
            qkv = random_qkv(4, 2, lengths=LENGTHS)
            around(lambda *qkv: sdpa.attend(*qkv, sequences, scale=0.3, dropout=0.3), *qkv).square().sum().backward()
            return [x.grad for x in qkv]

        pairs = zip(backward(computed_again), backward(lambda function, *qkv: function(*qkv)))
    else:
        pairs = zip(outcome(computed_again), outcome(lambda function, *qkv: function(*qkv)))
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"dropout": 0.2}], ids=str)
def test_neighbours_change_nothing_in_any_bit(options):
    sequences = PackedSequences.from_lengths(LENGTHS)
    qkv = random_qkv(4, 2, lengths=LENGTHS)

    def last():
        torch.manual_seed(0)
        return sdpa.attend(*qkv, sequences, scale=0.3, **options)[-200:]

    before = last()
    with torch.no_grad():
        for x in qkv:
            x[:-200].normal_()
    assert torch.equal(last(), before)


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"dropout": 0.2}], ids=str)
def test_one_autograd_node_whatever_the_number_of_sequences(options):
    output = sdpa.attend(
        *random_qkv(4, 2, lengths=LENGTHS), PackedSequences.from_lengths(LENGTHS), scale=1.0, **options
    )
    assert {type(node).__name__ for node, _ in output.grad_fn.next_functions} == {"AccumulateGrad"}


def test_gradients_of_a_bias_have_gradients():
    sequences = PackedSequences.from_lengths((5, 1, 4))
    options = {"key_bias": torch.randn(4, 10, generator=torch.Generator().manual_seed(3)), "scale": 0.4}

    def second(attend):
        qkv = random_qkv(4, 2, 4, lengths=sequences.lengths, dtype=torch.float64)
        first = torch.autograd.grad(
            (qkv[0] + attend(*qkv, sequences, **options)).square().sum(), qkv, create_graph=True
        )
        return torch.autograd.grad(sum(x.square().sum() for x in first), qkv)

    for found, expected in zip(second(sdpa.attend), second(reference), strict=True):
        torch.testing.assert_close(found, expected)


def test_bias_on_keys_in_torch_func():
    """There the bias lies in channels, as for kernels that know none."""
    sequences = PackedSequences.from_lengths((5, 4))
    q, k, v = (x.detach() for x in random_qkv(4, 2, 4, lengths=(5, 4), dtype=torch.float64))
    bias = torch.randn(4, 9, generator=torch.Generator().manual_seed(3))

    def loss(attend):
        return lambda q: attend(q, k, v, sequences, scale=0.4, key_bias=bias).square().sum()

    torch.testing.assert_close(*(torch.func.grad(loss(attend))(q) for attend in (sdpa.attend, reference)))


def test_a_seed_is_drawn_from_torchs_generator():
    """So `torch.manual_seed` decides what is dropped, and every call drops something else."""
    torch.manual_seed(0)
    first = dropped.seed_of_call()
    assert dropped.seed_of_call() != first
    torch.manual_seed(0)
    assert dropped.seed_of_call() == first
