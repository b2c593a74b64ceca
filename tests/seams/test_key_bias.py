"""A bias on keys is as exact as the scores that it is added to, in every dtype."""

from __future__ import annotations

import pytest
import torch

from padfree_patch import PackedSequences
from padfree_patch.attention import key_bias, sdpa
from padfree_patch.attention.exact_parts import parts_of
from padfree_patch.seams.kernel import PackedKernel
from padfree_patch.seams.stand_in import CAUSAL


def half_and_exact(dtype, length=300):
    """Gives q, k and v (1, H, T, D) in half precision, and the same in float32."""
    generator = torch.Generator().manual_seed(3)
    half = [torch.randn(1, heads, length, 64, generator=generator).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    return half, [x.detach().float().requires_grad_() for x in half]


def written_out(q, k, v, bias):
    """Attention over one sequence as flash-attn's own tests write it: products in q's dtype, the bias in float32."""
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = q @ (k * 64**-0.5).transpose(2, 3) + bias[None, :, None] * 64**-0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype) @ v


@pytest.mark.parametrize("autocast", [False, True], ids=["half precision", "autocast"])
@pytest.mark.parametrize("slope", [0.3, 3.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_bias_on_keys_is_not_rounded(monkeypatch, dtype, slope, autocast):
    """The bound is that of flash-attn's own tests: twice what PyTorch gets wrong. One channel exceeds it."""
    bias = slope * torch.tensor([[1.0], [0.71], [0.53], [0.37]]) * torch.arange(300) * 64**0.5
    half, exact = half_and_exact(dtype)
    weights = torch.randn(1, 4, 300, 64, generator=torch.Generator().manual_seed(4)).to(dtype)

    def errors(output, inputs):
        found = (output, *torch.autograd.grad(output, inputs, weights.to(output.dtype)))
        return [(one.float() - right).abs().max().item() for one, right in zip(found, expected)]

    right = written_out(*exact, bias)
    expected = [right, *torch.autograd.grad(right, exact, weights.float())]

    def ours():
        inputs = exact if autocast else half
        packed = PackedKernel(torch.nn.Identity(), PackedSequences.from_lengths((300,)), CAUSAL, "sdpa", bias)
        with torch.autocast("cpu", dtype, enabled=autocast):
            return errors(packed.attend(*inputs, scale=None, dropout=0.0), inputs)

    bounds = [2 * error for error in errors(written_out(*half, bias), half)]
    assert all(error <= bound for error, bound in zip(ours(), bounds, strict=True))
    monkeypatch.setattr(sdpa, "KNOWS_KEY_BIAS", False)  # as other backends, which get it in channels
    assert all(error <= bound for error, bound in zip(ours(), bounds, strict=True))
    monkeypatch.setattr(key_bias, "parts_of", lambda x, dtype: parts_of(x, dtype) * torch.tensor([1, 0, 0]))
    assert any(error > bound for error, bound in zip(ours(), bounds, strict=True))


@pytest.mark.parametrize("in_channels", [False, True])
def test_bias_that_is_infinite_hides_its_key(monkeypatch, in_channels):
    monkeypatch.setattr(sdpa, "KNOWS_KEY_BIAS", not in_channels)
    half, exact = half_and_exact(torch.float16, 5)
    bias = torch.zeros(4, 5)
    bias[:, [0, 2]] = -torch.inf
    packed = PackedKernel(torch.nn.Identity(), PackedSequences.from_lengths((5,)), CAUSAL, "sdpa", bias)
    found = packed.attend(*half, scale=None, dropout=0.0)
    expected = written_out(*exact, bias)
    torch.testing.assert_close(found[:, :, 1:].float(), expected[:, :, 1:], rtol=1e-3, atol=1e-3)
    assert found.isfinite().all()  # also of the first token, which sees itself only
