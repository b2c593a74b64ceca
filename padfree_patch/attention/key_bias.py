"""A bias on the scores of each key, hidden in channels of queries and keys, for kernels that know no bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .exact_parts import parts_of

BIAS_CHANNELS = 8
"""Channels that a bias adds to each head: three are used, but fast kernels want a multiple of eight."""


def with_key_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Adds channels to q, k and v, in which q @ k.T adds a bias to the scores of each key.

    So every kernel can do it, without a mask. In half precision one channel would round the bias. Kernels add up in
    float32, so three channels carry it: what the first rounds away, and what the second does.

    Args:
        q: (B, H, T, D).
        k, v: (B, K, T, D).
        bias: (H, B * T), added before the scale.

    Returns q, k and v as (B, H, T, D + BIAS_CHANNELS).
    """
    if k.shape[1] != q.shape[1]:  # the bias differs between the heads that would share a key
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    of_keys = parts_of(bias.view(bias.shape[0], q.shape[0], -1).transpose(0, 1), k.dtype)  # (B, H, T, 3)
    unused = (0, BIAS_CHANNELS - of_keys.shape[3])
    q = torch.cat([q, F.pad(torch.ones_like(of_keys), unused)], dim=3)
    k = torch.cat([k, F.pad(of_keys, unused)], dim=3)
    return q, k, F.pad(v, (0, BIAS_CHANNELS))
