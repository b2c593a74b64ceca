"""What an attention forward may do on the way to its kernel, and what is an error because it would be lost."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from padfree_patch import PackedSequences, PadfreeError, attention
from padfree_patch.attention import flash_attn, flash_family
from padfree_patch.batch.packed_batch import PackedBatch
from padfree_patch.seams import flash_attn as flash_attn_seam
from padfree_patch.seams.attention import KernelMode
from padfree_patch.seams.kernel import PackedKernel
from padfree_patch.seams.stand_in import CAUSAL
from padfree_patch.seams.under_way import running
from padfree_patch.testing import SyncCounter
from padfree_patch.wrapping.seam import wrapped

pytestmark = pytest.mark.versions


SEQUENCES = PackedSequences.from_lengths((2, 3))


def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 5, 8, generator=generator) for _ in range(3)]


@contextmanager
def kernel(key_bias=None):
    packed = PackedKernel(torch.nn.Identity(), SEQUENCES, CAUSAL, "sdpa", key_bias)
    with running(kernel=packed), KernelMode(packed):
        yield


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
    shown = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(PadfreeError, match=f"Identity adds a tensor {shown} to its attention scores"), kernel():
        eager(*qkv(), lambda scores: scores + torch.ones(shape))


def test_scores_multiplied_by_a_tensor_are_refused():
    message = r"Identity multiplies its attention scores by a tensor \(5,\) before the softmax"
    with pytest.raises(PadfreeError, match=message), kernel():
        eager(*qkv(), lambda scores: scores * torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_queries_and_keys_cast_up_give_the_values_dtype(dtype):
    """Phi's eager attention casts them up, and its scores down to the values' dtype."""
    q, k, v = qkv()
    with kernel():
        found = eager(q, k, v.to(dtype))
    torch.testing.assert_close(found, alone(q, k, v.to(dtype).float()).to(dtype))


class Took(Exception):
    """What the kernel below raises: the dtypes that it was given."""


def test_queries_and_keys_cast_up_do_not_lose_the_fast_kernel(monkeypatch):
    def kernel_that_tells(q, k, v, *_, **options):
        raise Took({x.dtype for x in (q, k, v)})

    monkeypatch.setattr(flash_family, "DEVICES", ("cpu",))
    monkeypatch.setattr(flash_attn, "refusal", flash_family.kernels_refuse)
    monkeypatch.setattr(flash_attn, "attend", kernel_that_tells)
    attention.select.cache_clear()
    try:
        for backend in ("flash_attn", "auto"):
            packed = PackedKernel(torch.nn.Identity(), SEQUENCES, CAUSAL, backend)
            q, k, v = qkv()
            with pytest.raises(Took, match=r"^\{torch.bfloat16\}$"):
                packed.attend(q, k, v.bfloat16(), scale=None, dropout=0.0)
    finally:
        attention.select.cache_clear()


def test_float64_stays_so_under_autocast():
    """Autocast never casts it."""
    with kernel(), torch.autocast("cpu", torch.bfloat16):
        found = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in qkv()))
    torch.testing.assert_close(found, alone(*(x.double() for x in qkv())))


def test_kernel_called_on_other_tokens_is_refused():
    message = "Identity: the batch has 5 tokens, but its kernel was called on 4 queries and 5 keys"
    with pytest.raises(PadfreeError, match=message), kernel():
        q, k, v = qkv()
        torch.nn.functional.scaled_dot_product_attention(q[:, :, :4], k, v)


def test_mask_that_upstream_made_itself_is_refused():
    with pytest.raises(PadfreeError, match="passes a mask of its own"), kernel():
        torch.nn.functional.scaled_dot_product_attention(*qkv(), attn_mask=torch.ones(5, 5))


def flash(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    raise AssertionError("the packed call must not come here")


def call_flash(**options):
    q, k, v = (x.transpose(1, 2) for x in qkv())
    return wrapped(flash, flash_attn_seam.concerns, flash_attn_seam.answer_kernel)(q, k, v, **options).transpose(1, 2)


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


BATCH = PackedBatch(SEQUENCES, torch.tensor([[0, 1, 0, 1, 2]]))


@contextmanager
def kernel_with_positions(positions):
    packed = PackedKernel(torch.nn.Identity(), SEQUENCES, CAUSAL, "sdpa")
    with running(kernel=packed), KernelMode(packed, positions, BATCH):
        yield


def test_maximum_of_other_tensors_is_their_own():
    """A router or an adapter may take the maximum of integers of its own while the module runs."""
    experts = torch.tensor([3, 7, 1])
    positions = BATCH.positions_from_zero
    with kernel_with_positions(positions):
        assert experts.max().item() == 7
        assert experts[:1].max().item() == 3
        assert positions[0].max().item() == 2
        assert positions[:, 0].max().item() == 0


def test_last_positions_are_known_without_a_sync():
    """Classes for flash-attn before 4.48 ask so for the size of their rotary tables, in every layer."""
    for positions, largest in ((BATCH.positions_from_zero, 2), (torch.arange(5)[None], 4)):
        with kernel_with_positions(positions), SyncCounter() as syncs:
            found = positions[:, -1].max().item()
        assert (found, syncs.total) == (largest, 0)
        assert found == positions[:, -1].max().item()
