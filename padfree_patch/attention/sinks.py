"""Attention sinks: one more logit of each head in every softmax, whose weight goes nowhere (GPT-OSS).

A sink is merged into attention without it as another part of the keys would be, by the log-sum-exp of the scores. Its
value is zero, so it only makes the output smaller. A kernel's own backward is right for the merged output and
log-sum-exp, since its weights are exp(scores - lse).

Letters: T tokens of all sequences, L of one, H query heads, D head size. dx is the gradient of x.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Merges sinks (H,) into what one sequence has without them, in place: out (1, H, L, D) and lse (1, H, L)."""
    merged = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    out *= (lse - merged).exp_().unsqueeze(-1)
    lse.copy_(merged)


def gradient_of_sinks(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Computes dsinks (H,) from what all sequences have with them: dout and out (T, H, D), lse (T, H)."""
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)  # (T, H)
    weights = (sinks.to(lse.dtype) - lse).exp()  # of the sink, for each query
    return -(weights * delta).sum(0).to(sinks.dtype)


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Computes the weights of keys, and of the sink of each query, by operations that autograd and `torch.func` follow.

    Args:
        scores: (1, K, G * L, keys), of the G query heads that share each of K key heads.
        sinks: (K * G,), or None.

    Returns the weights (1, K, G * L, keys), and those of the sinks (1, K, G * L, 1), which is (1, K, G * L, 0) without.
    """
    if sinks is None:
        return scores.softmax(-1), scores[..., :0]
    _, key_heads, rows, _ = scores.shape
    groups = len(sinks) // key_heads
    column = sinks.to(scores.dtype).reshape(1, key_heads, groups, 1).expand(-1, -1, -1, rows // groups)
    weights = torch.cat([scores, column.reshape(1, key_heads, rows, 1)], dim=-1).softmax(-1)
    return weights[..., :-1], weights[..., -1:]
