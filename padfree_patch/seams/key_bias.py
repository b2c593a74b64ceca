"""ALiBi and its kind: a bias on the scores of each key, made for each sequence and hidden in a channel of the keys.

Upstream's `build_alibi_tensor` counts positions over the row. A packed row gets none from it; the patch makes one for
each sequence (`Patch.attention_call`).
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import pretrained_modules
from ..registry import Patch
from ..wrapping.call import Call
from ..wrapping.seam import Seam
from .kinds import Found, class_named
from .mask import concerns

NAME = "key bias"

BUILDER = "build_alibi_tensor"


def find(model: nn.Module, patch: Patch) -> Found:
    files = {class_named(m, patch.decoder).__module__ for m in pretrained_modules(model) if patch.is_decoder(m)}
    return Found(
        frozenset(Seam(each, BUILDER, concerns, answer) for each in files if hasattr(sys.modules[each], BUILDER))
    )


def answer(call: Call) -> None:
    """Answers upstream's builder of ALiBi: a packed row has none."""


def with_key_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Adds one more channel to q, k and v, in which q @ k.T adds a bias to the scores of each key.

    So every backend can do it, without a mask. Eight channels, because fast kernels want a multiple of that.

    Args:
        q: (B, H, T, D).
        k, v: (B, K, T, D).
        bias: (H, B * T), added before the scale.

    Returns q, k and v as (B, H, T, D + 8).
    """
    if k.shape[1] != q.shape[1]:  # the bias differs between the heads that would share a key
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    of_keys = bias.view(bias.shape[0], q.shape[0], -1, 1).transpose(0, 1).to(k.dtype)  # (B, H, T, 1)
    q = F.pad(torch.cat([q, torch.ones_like(of_keys)], dim=3), (0, 7))
    k = F.pad(torch.cat([k, of_keys], dim=3), (0, 7))
    return q, k, F.pad(v, (0, 8))
