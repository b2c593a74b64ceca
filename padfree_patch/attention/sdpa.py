"""Varlen attention on plain PyTorch, one `scaled_dot_product_attention` per sequence, on any device.

`split` views instead of slices: autograd then joins the gradients of all pieces once, where slicing would write a
zero-filled gradient of the whole batch per sequence. No mask is built except for sliding windows, and that one is
never larger than a chunk of queries by what they see.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import versions
from ..packing import PackedSequences

if TYPE_CHECKING:
    from . import Needs

NAME = "sdpa"


def refusal(needs: Needs) -> str | None:
    """Why this backend can't do what is needed, or None."""
    if needs.softcap:
        return "scaled_dot_product_attention has no softcap"
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
        softcap: refused by this backend (see `refusal`).
        dropout: probability with which an attention weight is dropped.

    Returns (T, H, D), in the dtype of q.
    """
    assert not softcap, "the selector never sends a softcap here"
    lengths = list(sequences.lengths)
    pieces = zip(*(x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (q, k, v)))  # (1, heads, length, D)
    outputs = []
    for q_piece, k_piece, v_piece in pieces:
        if window and q_piece.shape[2] > window:
            output = _windowed(q_piece, k_piece, v_piece, window, scale=scale, dropout=dropout)
        else:
            output = _sdpa(q_piece, k_piece, v_piece, scale=scale, dropout=dropout, is_causal=True)
        outputs.append(output.squeeze(0).transpose(0, 1))  # (length, H, D)
    return torch.cat(outputs)


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int, *, scale: float, dropout: float) -> Tensor:
    """Sliding-window attention of one sequence, in chunks of queries, each against the keys that it can see.

    The chunk trades mask size against the number of calls; a quarter of the window wastes at most a fifth of the work.
    """
    length = q.shape[2]
    chunk = min(max(window // 4, 64), 256)
    outputs = []
    for start in range(0, length, chunk):
        stop, first = min(start + chunk, length), max(start - window + 1, 0)
        distance = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)
        visible = (distance >= 0) & (distance < window)  # (queries, keys)
        piece = _sdpa(
            q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], scale=scale, dropout=dropout, mask=visible
        )
        outputs.append(piece)
    return torch.cat(outputs, dim=2)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    dropout: float,
    mask: Tensor | None = None,
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
