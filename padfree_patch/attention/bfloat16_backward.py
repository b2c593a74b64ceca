"""The backward of one bfloat16 sequence on the CPU, in matrix products that do not round their scores too far.

A bfloat16 product accumulates in float32 but rounds its result, and rounded scores would be too coarse. The backward
of FlashAttention (arXiv 2205.14135, appendix B) subtracts a number per query from two products:

    weights = exp(scale * q @ k.T - lse)
    dscores = weights * (dout @ v.T - sum(dout * out))

Here each product subtracts it itself, before its result is rounded: three more channels of q and dout hold that number
(`exact_parts`), and k and v have ones there.

Letters: L tokens of the sequence, H query heads, K key/value heads, G = H / K, D head size. dx is the gradient of x.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .exact_parts import parts_of

CHUNK = 128
"""Queries per matrix product."""


def gradients_by_matmuls(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes dq, dk and dv of one sequence: q (1, H, L, D), k and v (1, K, L, D), lse (1, H, L) in float32."""
    (key_heads, length), groups = k.shape[1:3], q.shape[1] // k.shape[1]
    delta = (dout.float() * out.float()).sum(-1)  # (1, H, L)
    ones = k.new_ones(*k.shape[:3], 3)
    q_lse = torch.cat([q, parts_of(lse / -scale, q.dtype)], -1)[0].unflatten(0, (key_heads, groups))  # (K, G, L, D + 3)
    dout_delta = torch.cat([dout, parts_of(-delta, q.dtype)], -1)[0].unflatten(0, (key_heads, groups))
    k_ones, v_ones = (torch.cat([x, ones], -1)[0].transpose(1, 2) for x in (k, v))  # (K, D + 3, L)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(x.shape[1:], dtype=torch.float32, device=x.device) for x in (k, v))  # (K, L, D)
    unused = q.new_empty(())
    for start in range(0, length, CHUNK):
        stop = min(start + CHUNK, length)
        rows = stop - start
        q_rows, dout_rows = (x[:, :, start:stop].flatten(1, 2) for x in (q_lse, dout_delta))  # (K, G * rows, D + 3)
        weights = torch.baddbmm(unused, q_rows, k_ones[:, :, :stop], beta=0, alpha=scale)  # (K, G * rows, stop)
        weights[:, :, start:].unflatten(1, (groups, rows)).add_(_causal(rows, q.dtype))
        weights.exp_()
        dscores = torch.baddbmm(unused, dout_rows, v_ones[:, :, :stop], beta=0, alpha=scale).mul_(weights)
        dv[:, :stop] += weights.transpose(1, 2) @ dout_rows[:, :, :-3]
        dk[:, :stop] += dscores.transpose(1, 2) @ q_rows[:, :, :-3]
        dq_rows = dscores @ k[0, :, :stop]  # (K, G * rows, D)
        dq[0, :, start:stop] = dq_rows.unflatten(1, (groups, rows)).flatten(0, 1)
    return dq, dk[None], dv[None]


@functools.lru_cache(maxsize=16)
def _causal(rows: int, dtype: torch.dtype) -> Tensor:
    """Makes a mask to add, (rows, rows): -inf where a key comes after its query."""
    return torch.full((rows, rows), -torch.inf, dtype=dtype, device="cpu").triu_(1)
