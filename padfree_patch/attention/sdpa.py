"""Varlen attention on plain PyTorch, on any device: the one backend that can do everything, and runs everywhere.

On the CPU, `padfree_patch.attention.cpu` computes it where it can, and `cpu_products` what PyTorch's operators lack.
Elsewhere, and in `torch.func`, it is one `scaled_dot_product_attention` per sequence, or matrix products for what that
function can't do. No mask is larger than a chunk of queries by the keys that they see.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import versions
from ..batch.sequences import PackedSequences
from . import cpu, cpu_products
from .key_bias import with_key_bias
from .per_sequence import chunk_size, working_dtype
from .prompts import split_with_seen_keys
from .second_order import transformed
from .sinks import softmax_with_sinks
from .spec import Needs, check_shapes

NAME = "sdpa"
ANY_VALUE_SIZE = True
KNOWS_PROMPTS = True
KNOWS_SINKS = True
KNOWS_KEY_BIAS = True


def refusal(needs: Needs) -> str | None:
    """Says why this backend can't do what a call needs; None if it can, as on the CPU it always can."""
    if needs.sinks and needs.device != "cpu":
        return f"computes sinks on the CPU only, found {needs.device}"  # nobody has measured it elsewhere
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
    """Computes attention, on any device and with every option (`Backend.attend`)."""
    check_shapes(q, k, v, sequences)
    on_cpu, in_torch_func = q.device.type == "cpu", transformed(q, k, v, sinks)
    beyond_the_operators = bool(softcap) or bool(dropout) or key_bias is not None
    if on_cpu and not in_torch_func and not beyond_the_operators and cpu.works():
        return cpu.attend(q, k, v, sequences, scale=scale, window=window, sinks=sinks)
    if on_cpu and not in_torch_func and (beyond_the_operators or sinks is not None):
        options: dict[str, Any] = {"window": window, "softcap": softcap, "dropout": dropout, "sinks": sinks}
        return cpu_products.attend(q, k, v, sequences, scale=scale, key_bias=key_bias, **options)
    of_values = v.shape[2]
    if key_bias is not None:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in with_key_bias(q, k, v, key_bias))
    # The public function has no softcap. Nor does anything but matrix products know every transform of torch.func.
    by_matmuls = bool(softcap) or in_torch_func
    attend_chunk: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    if by_matmuls:
        attend_chunk = functools.partial(_matmuls, sinks=sinks, scale=scale, softcap=softcap, dropout=dropout)
    else:
        attend_chunk = functools.partial(_sdpa, scale=scale, dropout=dropout)
    outputs = []
    with _without_cudnn(q.device):
        for q_, k_, v_ in split_with_seen_keys(sequences, (q,), (k, v)):
            if by_matmuls or 0 < window < k_.shape[2] or q_.shape[2] < k_.shape[2]:
                output = _in_chunks(attend_chunk, q_, k_, v_, window=window)
            else:
                output = _sdpa(q_, k_, v_, scale=scale, dropout=dropout, is_causal=True)
            outputs.append(output.squeeze(0).transpose(0, 1))  # (length, H, D)
    output = torch.cat(outputs)
    return output if key_bias is None else output[..., :of_values]


@contextlib.contextmanager
def _without_cudnn(device: torch.device) -> Iterator[None]:
    """Keeps torch from cuDNN's kernels, which it prefers on Hopper: they make a plan for every new length.

    Not where the user has allowed no other kernel.
    """
    if device.type != "cuda" or versions.torch("<2.5") or not _cudnn_is_one_of_several():
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def _cudnn_is_one_of_several() -> bool:
    allowed = torch.backends.cuda
    others = (allowed.flash_sdp_enabled, allowed.mem_efficient_sdp_enabled, allowed.math_sdp_enabled)
    return allowed.cudnn_sdp_enabled() and any(each() for each in others)


def _in_chunks(
    attend_chunk: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, *, window: int
) -> Tensor:
    """Computes one sequence in chunks of queries, each against the keys that it can see.

    If there are more keys than queries, the first ones are those of a shared prompt.
    """
    keys = k.shape[2]
    window = window or keys
    chunk = chunk_size(window)
    outputs = []
    for start in range(keys - q.shape[2], keys, chunk):  # counted from the first key
        stop, first = min(start + chunk, keys), max(start - window + 1, 0)
        distance = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)
        visible = (distance >= 0) & (distance < window)  # (queries, keys)
        queries = slice(start - keys + q.shape[2], stop - keys + q.shape[2])
        outputs.append(attend_chunk(q[:, :, queries], k[:, :, first:stop], v[:, :, first:stop], visible))
    return torch.cat(outputs, dim=2)


def _matmuls(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    *,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    dropout: float,
) -> Tensor:
    """Computes a chunk in matrix products, in float32 at least; visible: bool (queries, keys).

    The backward computes the scores again: kept, those of all chunks would be as many as those of the whole sequence.
    """
    groups = q.shape[1] // k.shape[1]
    working = working_dtype(q.dtype)

    def compute(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            q_grouped = q.to(working).unflatten(1, (-1, groups)).flatten(2, 3)  # (1, K, groups * queries, D)
            scores = q_grouped * scale @ k.to(working).transpose(2, 3)
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            weights, _ = softmax_with_sinks(scores.masked_fill(~visible.repeat(groups, 1), -torch.inf), sinks)
            weights = F.dropout(weights, dropout) if dropout else weights
            output = weights @ v.to(working)
            return output.unflatten(2, (groups, -1)).flatten(1, 2).to(q.dtype)

    if transformed(q, k, v, sinks):  # torch.func does not take checkpoints
        return compute(q, k, v, sinks)
    return checkpoint(compute, q, k, v, sinks, use_reentrant=False, preserve_rng_state=dropout > 0)


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
    """Calls the public function, for a sequence or a chunk; repeats the keys where it does not know shared ones."""
    grouped = {}
    if q.shape[1] != k.shape[1]:
        if versions.torch(">=2.5"):
            grouped = {"enable_gqa": True}
        else:
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scale, **grouped
    )
