"""ALiBi and its kind: a bias on the scores of each key, made for each sequence and hidden in a channel of the keys.

Upstream's `build_alibi_tensor` counts positions over the row. A packed row gets none from it; the patch makes one for
each sequence (`Patch.attention_call`).
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.exact_parts import parts_of
from ..models import pretrained_modules
from ..registry import Patch
from ..wrapping.call import Call
from ..wrapping.seam import Seam
from .kinds import Found, class_named
from .mask import concerns

NAME = "key bias"

BUILDER = "build_alibi_tensor"

BIAS_CHANNELS = 8
"""Channels that a bias adds to each head: three are used, but fast kernels want a multiple of eight."""


def find(model: nn.Module, patch: Patch) -> Found:
    files = {class_named(m, patch.decoder).__module__ for m in pretrained_modules(model) if patch.is_decoder(m)}
    return Found(
        frozenset(Seam(each, BUILDER, concerns, answer) for each in files if hasattr(sys.modules[each], BUILDER))
    )


def answer(call: Call) -> None:
    """Answers upstream's builder of ALiBi: a packed row has none."""


def with_key_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Adds channels to q, k and v, in which q @ k.T adds a bias to the scores of each key.

    So every backend can do it, without a mask. In half precision one channel would round the bias. Kernels add up in
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
