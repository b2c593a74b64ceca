"""Varlen attention on plain PyTorch, on any device: the one backend that can do everything, and runs everywhere.

On the CPU that is `padfree_patch.attention.cpu`. Elsewhere, and where that one can't, it is one
`scaled_dot_product_attention` per sequence, on `split` views instead of slices: autograd then joins the gradients of
all pieces once, where slicing would write a zero-filled gradient of the whole batch per sequence. Masks are never
larger than a chunk of queries by what they see.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import versions
from ..batch.sequences import PackedSequences
from . import cpu

if TYPE_CHECKING:
    from . import Needs

NAME = "sdpa"


def refusal(needs: Needs) -> str | None:
    """Why this backend can't do what is needed: None, it always can."""
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: PackedSequences,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention inside each sequence, never across two.

    T tokens of all sequences end to end, H query heads, K key/value heads, D head size.

    Args:
        q: (T, H, D).
        k, v: (T, K, D), with H a multiple of K.
        sequences: their lengths add up to T; lengths 2, 4, 3 have cu_seqlens [0, 2, 6, 9].
        scale: factor on q @ k.T before the softmax; usually D ** -0.5.
        window: newest tokens that a query sees, itself included; 0 for all of its sequence.
        softcap: scores become softcap * tanh(scores / softcap); 0 for none.
        dropout: probability with which an attention weight is dropped.

    Returns (T, H, D), in the dtype of q.
    """
    lengths = sequences.lengths
    if q.device.type == "cpu" and k.shape == v.shape and not (softcap or dropout) and cpu.works():
        return cpu.attend(q, k, v, lengths, scale=scale, window=window)
    # The public function has no softcap, and on the CPU no dropout without all scores of a sequence in memory.
    by_matmuls = softcap or (dropout and q.device.type == "cpu")
    of_chunk: Callable[..., Tensor] = functools.partial(_sdpa, scale=scale, dropout=dropout)
    if by_matmuls:
        of_chunk = functools.partial(_matmuls, scale=scale, softcap=softcap, dropout=dropout)
    pieces = zip(*(x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (q, k, v)))  # (1, heads, length, D)
    outputs = []
    for piece in pieces:
        if by_matmuls or 0 < window < piece[0].shape[2]:
            output = _in_chunks(of_chunk, *piece, window=window)
        else:
            output = of_chunk(*piece, is_causal=True)
        outputs.append(output.squeeze(0).transpose(0, 1))  # (length, H, D)
    return torch.cat(outputs)


def _in_chunks(of_chunk: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *, window: int) -> Tensor:
    """Attention of one sequence, in chunks of queries, each against the keys that it can see.

    The chunk trades mask size against the number of calls; a quarter of the window wastes at most a fifth of the work.
    """
    length = q.shape[2]
    window = window or length
    chunk = min(max(window // 4, 64), 256)
    outputs = []
    for start in range(0, length, chunk):
        stop, first = min(start + chunk, length), max(start - window + 1, 0)
        distance = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)
        visible = (distance >= 0) & (distance < window)  # (queries, keys)
        outputs.append(of_chunk(q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], visible))
    return torch.cat(outputs, dim=2)


def _matmuls(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, scale: float, softcap: float, dropout: float
) -> Tensor:
    """Attention of a chunk written out, in float32 at least; visible: bool (queries, keys).

    Recomputed in the backward: the scores of all chunks together would be those of the whole sequence.
    """
    groups = q.shape[1] // k.shape[1]
    working = torch.promote_types(q.dtype, torch.float32)

    def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            q_grouped = q.to(working).unflatten(1, (-1, groups)).flatten(2, 3)  # (1, K, groups * queries, D)
            scores = q_grouped * scale @ k.to(working).transpose(2, 3)
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            weights = scores.masked_fill(~visible.repeat(groups, 1), -torch.inf).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            output = weights @ v.to(working)
            return output.unflatten(2, (groups, -1)).flatten(1, 2).to(q.dtype)

    return checkpoint(compute, q, k, v, use_reentrant=False, preserve_rng_state=dropout > 0)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    dropout: float,
    is_causal: bool = False,
) -> Tensor:
    grouped = {}
    if q.shape[1] != k.shape[1]:
        if _has_grouped_queries():
            grouped = {"enable_gqa": True}
        else:
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scale, **grouped
    )


def _has_grouped_queries() -> bool:
    torch_version = versions.installed("torch")
    return torch_version is not None and versions.inside(torch_version, ">=2.5")
