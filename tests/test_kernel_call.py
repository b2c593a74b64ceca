"""What an attention forward may do on the way to its kernel, and what is an error because it would be lost."""

from __future__ import annotations

import pytest
import torch

from padfree_patch import PackedSequences, PadfreeError, kernel_call

pytestmark = pytest.mark.versions


SEQUENCES = PackedSequences.from_lengths((2, 3))


def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 5, 8, generator=generator) for _ in range(3)]


def kernel(key_bias=None):
    return kernel_call._KernelCall(torch.nn.Identity(), SEQUENCES, 0, "sdpa", key_bias)


def eager(q, k, v, change=lambda scores: scores):
    return torch.softmax(change(q @ k.transpose(2, 3)) * 8**-0.5, -1) @ v


def alone(q, k, v, bias=0.0):
    """Each sequence by itself, with a causal mask; bias (H, T) is added before the scale."""
    outputs = []
    for start, end in ((0, 2), (2, 5)):
        scores = q[:, :, start:end] @ k[:, :, start:end].transpose(2, 3)
        if torch.is_tensor(bias):
            scores = scores + bias[None, :, None, start:end]
        hidden = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        outputs.append((scores * 8**-0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, :, start:end])
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("rest", [None, torch.zeros(1, 1, 1, 1)], ids=["no mask", "one element"])
def test_what_is_left_of_a_mask_may_be_added(rest):
    with kernel():
        found = eager(*qkv(), lambda scores: scores + rest)
    torch.testing.assert_close(found, alone(*qkv()))


def test_bias_on_keys_is_added_once_whoever_adds_it():
    bias = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    expected = alone(*qkv(), bias)
    with kernel(bias):
        added_by_upstream = eager(*qkv(), lambda scores: scores + bias[None, :, None])
        in_its_mask = torch.nn.functional.scaled_dot_product_attention(*qkv())
    torch.testing.assert_close(added_by_upstream, expected)
    torch.testing.assert_close(in_its_mask, expected)


@pytest.mark.parametrize("shape", [(1, 2, 1, 5), (1, 1, 5, 5)], ids=["on keys", "on pairs"])
def test_bias_that_no_patch_knows_is_refused(shape):
    with pytest.raises(PadfreeError, match="something that is no mask is added"), kernel():
        eager(*qkv(), lambda scores: scores + torch.ones(shape))


def test_mask_of_upstreams_own_is_refused():
    with pytest.raises(PadfreeError, match="passes a mask of its own"), kernel():
        torch.nn.functional.scaled_dot_product_attention(*qkv(), attn_mask=torch.ones(5, 5))


def flash(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    raise AssertionError("the packed call must not come here")


def call_flash(**options):
    q, k, v = (x.transpose(1, 2) for x in qkv())
    return kernel_call.flash_attn_func(flash, (q, k, v), options).transpose(1, 2)


def test_flash_attn_is_answered_while_a_packed_call_is_under_way_and_only_then():
    with kernel():
        found = call_flash(causal=True)
    torch.testing.assert_close(found, alone(*qkv()))
    with pytest.raises(AssertionError, match="must not come here"):
        call_flash(causal=True)


def test_attention_that_is_not_causal_is_refused():
    with pytest.raises(PadfreeError, match="not plainly causal"), kernel():
        call_flash(causal=False)


def test_a_softcap_reaches_the_backend():
    with kernel():
        plain, capped = call_flash(causal=True), call_flash(causal=True, softcap=0.5)
    assert not torch.allclose(plain, capped)
