"""A stand-in for flash-attn 2.6.3 that computes on the CPU in plain PyTorch, in any dtype.

So that upstream's own flash_attention_2 code runs here, unpatched as the oracle and patched; the parameters are those
of flash_attn/flash_attn_interface.py. `calls` counts what reaches it. What the real package computes is another
session's question (`nox -s flash_attn`).
"""

from __future__ import annotations

from collections import Counter

import torch

__version__ = "2.6.3"

calls: Counter[str] = Counter()


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """q (B, Tq, H, D), k and v (B, Tk, K, D)."""
    calls["dense"] += 1
    return torch.stack([_one(*each, dropout_p, softmax_scale, causal, window_size, softcap) for each in zip(q, k, v)])


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """q (T, H, D), k and v (T, K, D)."""
    calls["varlen"] += 1
    parts_q = q.tensor_split(cu_seqlens_q[1:-1].long().cpu())
    parts_k = k.tensor_split(cu_seqlens_k[1:-1].long().cpu())
    parts_v = v.tensor_split(cu_seqlens_k[1:-1].long().cpu())
    pieces = zip(parts_q, parts_k, parts_v)
    return torch.cat([_one(*each, dropout_p, softmax_scale, causal, window_size, softcap) for each in pieces])


def flash_attn_with_kvcache(*args, **kwargs):
    raise NotImplementedError("the stand-in has no paged cache")


def _one(q, k, v, dropout_p, scale, causal, window_size, softcap):
    """One sequence; the last query stands at the last key, as since flash-attn 2.1."""
    assert q.shape[1] % k.shape[1] == 0
    dtype = q.dtype
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.float() if dtype.itemsize < 4 else x for x in (q, k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    distance = (torch.arange(len(q)) + len(k) - len(q))[:, None] - torch.arange(len(k))
    left, right = window_size
    visible = distance >= (0 if causal else -right if right >= 0 else -len(k))
    if left >= 0:
        visible &= distance <= left
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    weights = torch.nn.functional.dropout(weights, dropout_p)
    return torch.einsum("hqk,khd->qhd", weights, v).to(dtype)
