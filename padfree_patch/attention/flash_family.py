"""What the CUDA kernels of the flash-attention family have in common: what they run on, and how they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..batch.sequences import PackedSequences
from .prompts import seen_keys
from .spec import Needs

Output = TypeVar("Output")

DEVICES = ("cuda",)
"""Device types that these kernels run on."""

DTYPES = (torch.float16, torch.bfloat16)
"""Dtypes that they take."""


def kernels_refuse(needs: Needs) -> str | None:
    """Says why no kernel of this family can do what a call needs; None if one can."""
    if needs.device not in DEVICES:
        return f"needs tensors on cuda, found {needs.device}"
    if needs.dtype not in DTYPES:
        return f"needs float16 or bfloat16, found {str(needs.dtype).removeprefix('torch.')}"
    if needs.head_dim > 256:
        return f"needs a head size of at most 256, found {needs.head_dim}"
    if torch.cuda.is_available() and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return f"needs a GPU of compute capability 8.0 (Ampere) or newer, found {major}.{minor}"
    return None


def left_and_right(window: int) -> tuple[int, int]:
    """Converts a window that counts the query itself into what these kernels take: tokens before it, and after it.

    >>> left_and_right(4)
    (3, 0)
    """
    return (window - 1, 0)


def call_varlen_func(
    function: Callable[..., Output],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: PackedSequences,
    *,
    scale: float,
    window: int,
    softcap: float,
    **more: object,
) -> Output:
    """Calls a package's `flash_attn_varlen_func`. Older ones lack a window or softcap: 0 of either is not passed.

    Where queries are fewer than keys, as after a shared prompt, the causal mask and the window end with the last key.
    """
    if window:
        more["window_size"] = left_and_right(window)
    if softcap:
        more["softcap"] = softcap
    keys = seen_keys(sequences)
    return function(
        q,
        keys.gather(k),
        keys.gather(v),
        cu_seqlens_q=sequences.kernel_cu_seqlens(),
        cu_seqlens_k=keys.cu_seqlens,
        max_seqlen_q=sequences.max_seqlen,
        max_seqlen_k=keys.longest,
        softmax_scale=scale,
        causal=True,
        **more,
    )
