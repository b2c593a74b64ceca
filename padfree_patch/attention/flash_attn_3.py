"""Varlen attention by FlashAttention-3 (package flash_attn_3, module `flash_attn_interface`).

Read against hopper/flash_attn_interface.py in the sdist of flash-attn 2.8.3. It has no dropout. Without a GPU only
its signature can be tested (tests/attention/signatures.json).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor

from ..batch.sequences import PackedSequences
from .flash_family import call_varlen_func, kernels_refuse
from .second_order import refuse_second_derivatives
from .spec import Needs, check_shapes

NAME = "flash_attn_3"
ANY_VALUE_SIZE = False
KNOWS_PROMPTS = True
KNOWS_SINKS = False
KNOWS_KEY_BIAS = False

REQUIRED = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
"""The arguments without a default that `attend` passes; builds of 2024 require more than these."""


def refusal(needs: Needs) -> str | None:
    """Says why this backend can't do what a call needs; None if it can."""
    try:
        takes = inspect.signature(_varlen_func()).parameters
    except ModuleNotFoundError:
        return "package flash_attn_3 is not installed (hopper/ in the flash-attention repository)"
    except ImportError as error:
        return f"package flash_attn_3 does not import: {error}"
    if needs.dropout:
        return "FlashAttention-3 has no dropout"
    unknown = {name for name, parameter in takes.items() if parameter.default is parameter.empty} - set(REQUIRED)
    missing = {"window_size": needs.window, "softcap": needs.softcap}
    if unknown or any(asked and name not in takes for name, asked in missing.items()):
        return "this build of flash_attn_3 is older than flash-attn 2.8; build it from a newer one"
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
    assert not dropout and sinks is None and key_bias is None, "the selector never sends any of them here"
    output = call_varlen_func(_varlen_func(), q, k, v, sequences, scale=scale, window=window, softcap=softcap)
    output = output[0] if isinstance(output, tuple) else output  # builds of 2024 return the log-sum-exp as well
    return refuse_second_derivatives(output, NAME)


def _varlen_func() -> Callable[..., Tensor | tuple[Tensor, ...]]:
    from flash_attn_interface import flash_attn_varlen_func

    function: Callable[..., Tensor | tuple[Tensor, ...]] = flash_attn_varlen_func
    return function
