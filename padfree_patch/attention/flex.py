"""Varlen attention by FlexAttention (`torch.nn.attention.flex_attention`) with a block mask of the sequences.

The kernel skips blocks of 128 queries by 128 keys that the mask leaves out. `create_block_mask` finds them in a dense
T x T mask. Here they follow from where the sequences begin, without such a mask and without a device sync. They are
computed once per forward: every layer gets the same `PackedSequences`, which keeps them. Where sequences share prompts,
their blocks of keys are added (`flex_prompts`).

Read against torch/nn/attention/flex_attention.py of 2.13.0. It has no dropout. On the CPU it has no backward, and takes
half a minute to compile; so only the mask and the uncompiled function are tested there.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import versions
from ..batch.sequences import PackedSequences
from .flex_prompts import block_mask_with_prompts
from .second_order import refuse_second_derivatives
from .spec import Needs, check_shapes

if TYPE_CHECKING:  # older torch has none
    from torch.nn.attention.flex_attention import BlockMask

NAME = "flex"
ANY_VALUE_SIZE = True
KNOWS_PROMPTS = True
KNOWS_SINKS = False
KNOWS_KEY_BIAS = False

BLOCK = 128
"""Queries and keys per block: what the kernel is tuned for."""
SMALLEST_HEAD = 16
"""Of queries and keys, and of values too."""


COMPILATION = {"cache_size_limit": 128, "specialize_float": True}
"""How Dynamo compiles the kernel. Each mix of dtype, window, softcap and grad mode is a graph of its own, and after
eight PyTorch would compute the ninth with all scores in memory. A second softcap becomes a symbol, which does not
compile."""


def refusal(needs: Needs) -> str | None:
    """Says why this backend can't do what a call needs; None if it can."""
    try:
        from torch.nn.attention.flex_attention import BlockMask
    except ImportError:
        return f"needs torch.nn.attention.flex_attention (torch >= 2.5), found torch {versions.installed('torch')}"
    if "seq_lengths" not in inspect.signature(BlockMask.from_kv_blocks).parameters:
        return f"block masks of torch {versions.installed('torch')} take no total length; update torch"
    if needs.device not in ("cuda", "xpu"):
        why = "has no backward on the CPU" if needs.device == "cpu" else f"has no kernel for {needs.device}"
        return f"FlexAttention {why}"
    if needs.dtype == torch.float64:
        return "FlexAttention has no kernel for float64"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which FlexAttention compiles its kernel with (pip install triton)"
    if needs.dropout:
        return "FlexAttention has no dropout"
    if needs.head_dim < SMALLEST_HEAD:
        return f"needs a head size of at least {SMALLEST_HEAD}, found {needs.head_dim}"
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
    """Computes attention (`Backend.attend`)."""
    check_shapes(q, k, v, sequences)
    assert not dropout and sinks is None and key_bias is None, "the selector never sends any of them here"
    of_values = v.shape[2]
    v = F.pad(v, (0, max(0, SMALLEST_HEAD - of_values)))
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # (1, heads, T, D)
    with torch._dynamo.config.patch(COMPILATION):
        output = compiled_flex_attention()(
            q,
            k,
            v,
            score_mod=_cap_of_scores(softcap) if softcap else None,
            block_mask=block_mask(sequences, window),
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return refuse_second_derivatives(output.squeeze(0).transpose(0, 1)[..., :of_values], NAME)


def block_mask(sequences: PackedSequences, window: int = 0) -> BlockMask:
    """Makes the `BlockMask` (1, 1, T, T) of causal attention inside each sequence, once for a `PackedSequences`."""
    key = f"flex block mask, window {window}"
    if key not in sequences.derived:
        if sequences.prefixes is None:
            sequences.derived[key] = _block_mask(sequences.kernel_cu_seqlens(), sequences.total, window)
        else:
            sequences.derived[key] = block_mask_with_prompts(sequences, window, BLOCK)
    mask: BlockMask = sequences.derived[key]
    return mask


def _block_mask(cu_seqlens: Tensor, total: int, window: int) -> BlockMask:
    from torch.nn.attention.flex_attention import BlockMask

    begins = cu_seqlens[:-1].long()
    lengths = cu_seqlens.diff().long()
    first_seen = torch.repeat_interleave(begins, lengths, output_size=total)  # (T,): where each token's sequence begins

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = (key <= query) & (key >= first_seen[query])
        return inside & (query - key < window) if window else inside

    block = torch.arange(-(-total // BLOCK), device=begins.device)
    # The first query of a block sees farthest back; from there to the block itself, all blocks of keys are needed.
    farthest = first_seen[block * BLOCK]
    if window:
        farthest = torch.maximum(farthest, block * BLOCK - window + 1)
    oldest = farthest // BLOCK
    indices = (oldest[:, None] + block).clamp(max=len(block) - 1)  # (query blocks, key blocks), the needed ones first
    return BlockMask.from_kv_blocks(
        (block - oldest + 1).int()[None, None],
        indices.int()[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(total, total),
    )


@functools.cache
def _cap_of_scores(softcap: float) -> Callable[..., Tensor]:
    """Makes the function that caps scores. The cache gives the compiled kernel the same one on every call."""

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


@functools.cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    """Compiles torch's function for any number of tokens: every batch has another.

    With `fullgraph`, what can't be compiled is an error; without, torch would compute it with all scores in memory.
    """
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=True, fullgraph=True)
    return compiled
