"""Varlen attention by the flash-attn 2 package (`flash_attn.flash_attn_varlen_func`).

Read against flash_attn/flash_attn_interface.py of flash-attn 2.8.3; the window came in 2.3.0, softcap in 2.6.0. Its
Triton kernels for ROCm (FLASH_ATTENTION_TRITON_AMD_ENABLE) give wrong gradients, without an error, for tensors of
different memory layouts (tests/own_process/flash_attn_checks.py shows it), so here they get contiguous ones.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable

from torch import Tensor

from .. import versions
from ..batch.sequences import PackedSequences
from ..errors import PadfreeError
from .flash_family import call_varlen_func, kernels_refuse
from .prompts import seen_keys
from .second_order import refuse_second_derivatives
from .spec import Needs, check_shapes

NAME = "flash_attn"
ANY_VALUE_SIZE = False
KNOWS_PROMPTS = True
KNOWS_SINKS = False
KNOWS_KEY_BIAS = False


def refusal(needs: Needs) -> str | None:
    """Says why this backend can't do what a call needs; None if it can."""
    if (version := versions.installed("flash-attn")) is None:
        return "package flash-attn is not installed (pip install flash-attn)"
    if reason := kernels_refuse(needs):
        return reason
    try:
        takes = inspect.signature(_varlen_func()).parameters
    except ImportError as error:
        return f"package flash-attn does not import: {error}"
    if needs.window and "window_size" not in takes:
        return "sliding windows need flash-attn >= 2.3"
    if needs.softcap and "softcap" not in takes:
        return "softcap needs flash-attn >= 2.6"
    if needs.prompts and versions.inside(version, "<2.1"):
        return "shared prompts need flash-attn >= 2.1, whose causal mask ends with the last key"
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
    sinks: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Computes attention (`Backend.attend`).

    Raises PadfreeError if the batch exceeds what the kernel can index (`check_int32_bound`).
    """
    check_shapes(q, k, v, sequences)
    assert sinks is None and key_bias is None, "the selector never sends either here"
    check_int32_bound(sequences, heads=q.shape[1], head_dim=q.shape[2])
    triton = os.environ.get("FLASH_ATTENTION_TRITON_AMD_ENABLE", "FALSE") == "TRUE"  # as the package itself asks
    if triton:  # its backward reads k, v and the output's gradient with the strides of others, without an error
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    output = call_varlen_func(
        _varlen_func(), q, k, v, sequences, scale=scale, window=window, softcap=softcap, dropout_p=dropout
    )
    if triton and output.requires_grad:
        output.register_hook(Tensor.contiguous)
    return refuse_second_derivatives(output, NAME)


def check_int32_bound(sequences: PackedSequences, *, heads: int, head_dim: int) -> None:
    """Raises PadfreeError if flash-attn's varlen backward would overflow its int32 offsets.

    The backward pads every sequence to 128 tokens and the head size to 32, and indexes the result with int32. An
    overflow is a crash or wrong gradients, far from its cause (flash-attention issues 1500 and 1311).
    """
    padded_dim = -(-head_dim // 32) * 32
    count = sequences.kernel_cu_seqlens().numel() - 1  # len would wait for the device if only that knows the lengths
    tokens = seen_keys(sequences).total
    elements = (tokens + 128 * count) * heads * padded_dim
    if elements >= 2**31:
        raise PadfreeError(
            f"flash_attn: {count} sequences of {tokens} tokens with {heads} heads of size {head_dim} "
            f"need {elements} elements in the backward, more than int32 can index ({2**31}); "
            "put fewer sequences into a batch"
        )


def _varlen_func() -> Callable[..., Tensor]:
    from flash_attn import flash_attn_varlen_func

    function: Callable[..., Tensor] = flash_attn_varlen_func
    return function
