"""Varlen attention by PyTorch itself: `torch.nn.attention.varlen.varlen_attn`, FlashAttention-2 without the package.

Read against torch/nn/attention/varlen.py of 2.11.0 and 2.13.0. It came in 2.10; scale and windows came after, so its
signature is asked for them. Its kernel shares keys among query heads in all of them, but a version with `enable_gqa`
wants to be told. It has neither dropout nor softcap, and no CPU kernel.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import cast

from torch import Tensor

from .. import versions
from ..batch.sequences import PackedSequences
from .flash_family import kernels_refuse, left_and_right
from .prompts import seen_keys
from .second_order import refuse_second_derivatives
from .spec import Needs, check_shapes

NAME = "torch_varlen"
ANY_VALUE_SIZE = False
KNOWS_PROMPTS = True
KNOWS_SINKS = False
KNOWS_KEY_BIAS = False


def refusal(needs: Needs) -> str | None:
    """Says why this backend can't do what a call needs; None if it can."""
    try:
        takes = _arguments(_varlen_attn())
    except ImportError:
        return f"needs torch.nn.attention.varlen (torch >= 2.10), found torch {versions.installed('torch')}"
    if missing := {"scale", "window_size"}.difference(takes):
        return f"varlen_attn of torch {versions.installed('torch')} takes no {', '.join(sorted(missing))}; update torch"
    if needs.dropout:
        return "varlen_attn has no dropout"
    if needs.softcap:
        return "varlen_attn has no softcap"
    return kernels_refuse(needs)


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
    sinks: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Computes attention (`Backend.attend`)."""
    check_shapes(q, k, v, sequences)
    assert not softcap and not dropout and sinks is None and key_bias is None, "the selector never sends any here"
    function, keys = _varlen_attn(), seen_keys(sequences)
    grouped = {"enable_gqa": True} if "enable_gqa" in _arguments(function) else {}
    output = function(
        q,
        keys.gather(k),
        keys.gather(v),
        cu_seq_q=sequences.kernel_cu_seqlens(),
        cu_seq_k=keys.cu_seqlens,
        max_q=sequences.max_seqlen,
        max_k=keys.longest,
        scale=scale,
        window_size=left_and_right(window) if window else (-1, 0),  # (-1, 0): causal over the whole sequence
        **(grouped if q.shape[1] != k.shape[1] else {}),
    )
    return refuse_second_derivatives(output, NAME)


@functools.lru_cache(maxsize=1)
def _arguments(function: Callable[..., Tensor]) -> frozenset[str]:
    """Returns the names of a function's arguments, which are asked for in every layer."""
    return frozenset(inspect.signature(function).parameters)


def _varlen_attn() -> Callable[..., Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    return cast("Callable[..., Tensor]", varlen_attn)  # a tuple only if it is asked for the log-sum-exp
