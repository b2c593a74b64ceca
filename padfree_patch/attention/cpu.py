"""Varlen attention on the CPU by the flash operators behind `scaled_dot_product_attention`, in one autograd node.

One node keeps autograd's graph from growing with the number of sequences. Inside it, the operators are called for each
sequence, with four differences from the public function:

- Unless a sequence is long, the operators also compute most of the scores that causality hides. So sequences of up to
  `CHUNKED_UNTIL` tokens are cut into chunks of queries (forward) and of keys (backward), each against what it can see.
  Sliding windows are the same chunks with less to see.
- What sequences see of a shared prompt that they go on from is another call, one for all of them without a window. Its
  output is merged with that on their own tokens by the log-sum-exp of their scores. So it is in the backward, with the
  merged output and log-sum-exp.
- Sinks are merged in the same way, as a part of the keys without values.
- In bfloat16 and float16 the operators are slow on short sequences, so each sequence is computed in float32. The
  backward of a longer bfloat16 sequence is matrix products in bfloat16 (`bfloat16_backward.py`).

The operators are private to PyTorch. `works` tries whether they are here and right; if not, `sdpa` does without them.

Letters: T tokens of all sequences, L of one, H query heads, K key/value heads, D head size. dx is the gradient of x.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch.sequences import PackedSequences
from .bfloat16_backward import gradients_by_matmuls
from .cpu_operators import flash_backward, flash_forward
from .cpu_prompts import backward_of_prompt, branches_of, merge_prompt, views
from .per_sequence import chunk_size, split_by_sequence, working_dtype
from .second_order import gradients_with_gradients, transformed
from .sinks import gradient_of_sinks, merge_sinks

CHUNKED_FROM, CHUNKED_UNTIL = 129, 2048
"""The shortest and the longest sequence that chunks speed up, in tokens.

Shorter ones have little to skip; on longer ones the operators skip by themselves. Measured, like the other numbers
here, on two x86 cores with AVX-512: benchmarks/attention.py.
"""
FORWARD_CHUNK, BACKWARD_CHUNK = 64, 128
"""Queries and keys per chunk."""
MATMULS_FROM = 193
"""Tokens from which a bfloat16 sequence has the faster backward in matrix products."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: PackedSequences,
    *,
    scale: float,
    window: int = 0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Computes `Backend.attend` where `works` is true and no tensor is `transformed`."""
    of_values = v.shape[2]
    if k.shape != v.shape:  # the operators want one head size; channels of zeros change no score and no value
        q, k, v = (F.pad(x, (0, max(k.shape[2], of_values) - x.shape[2])) for x in (q, k, v))
    q, k, v = (_with_dense_rows(x) for x in (q, k, v))
    out: Tensor = _Attention.apply(q, k, v, sinks, sequences, scale, window)[0]
    return out if out.shape[2] == of_values else out[..., :of_values]


@functools.cache
def works() -> bool:
    """Tries, on three tokens with shared keys, whether this PyTorch has the operators as they are called here."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, heads, 3, 8, generator=generator, device="cpu") for heads in (2, 1, 1, 2))
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        scores = 0.5 * leaves[0] @ leaves[1].transpose(2, 3)
        later = torch.ones(3, 3, dtype=torch.bool, device="cpu").triu(1)
        expected = scores.masked_fill(later, -torch.inf).softmax(-1) @ leaves[2]
        gradients = torch.autograd.grad(expected, leaves, dout)
    try:
        with torch.no_grad():
            out, lse = flash_forward(q, k, v, scale=0.5)
            found = (out, *flash_backward(dout, q, k, v, out, lse, scale=0.5))
    except (AttributeError, RuntimeError, TypeError):
        return False
    close = (x.shape == y.shape and torch.allclose(x, y, atol=1e-5) for x, y in zip(found, (expected, *gradients)))
    return all(close) and lse.shape == (1, 2, 3)


class _Options(NamedTuple):
    sequences: PackedSequences
    scale: float
    window: int


class _Context(Protocol):
    """What `_Attention` uses of the context that autograd gives it."""

    options: _Options
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def mark_non_differentiable(self, *outputs: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


class _Attention(torch.autograd.Function):
    """Computes (T, H, D), and the log-sum-exp (T, H) of the scores, of q (T, H, D), k and v (T, K, D), sinks (H,)."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, sequences: PackedSequences, scale: float, window: int
    ) -> tuple[Tensor, Tensor]:
        working = working_dtype(q.dtype)
        out = q.new_empty(q.shape, dtype=working if sequences.prefixes else q.dtype)  # what is merged is rounded once
        lse = q.new_empty(q.shape[:2], dtype=working)
        for q_, k_, v_, out_, lse_ in split_by_sequence(sequences.lengths, q, k, v, out, lse):
            result, its_lse = _forward(q_.to(working), k_.to(working), v_.to(working), scale, window)
            if sinks is not None:
                merge_sinks(result, its_lse, sinks)
            out_.copy_(result)
            lse_.copy_(its_lse)
        for prompt, branches in branches_of(sequences, together=not window):
            of_prompt, of_branches = views(prompt, k, v), views(branches, q)
            q_, k_, v_ = (x.to(working) for x in (*of_branches, *of_prompt))
            merge_prompt(q_, k_, v_, *views(branches, out, lse), scale=scale, window=window)
        return out.to(q.dtype), lse

    @staticmethod
    def setup_context(
        ctx: _Context,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, PackedSequences, float, int],
        output: tuple[Tensor, Tensor],
    ) -> None:
        q, k, v, sinks, sequences, scale, window = inputs
        ctx.options = _Options(sequences, scale, window)
        ctx.save_for_backward(q, k, v, sinks, *output)
        ctx.mark_non_differentiable(output[1])  # the log-sum-exp
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: _Context, dout: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
        if dout is None:  # what came after attention has no gradient
            return None, None, None, None, None, None, None
        q, k, v, sinks, out, lse = ctx.saved_tensors
        sequences, scale, window = ctx.options
        if torch.is_grad_enabled() or transformed(dout):  # create_graph=True, or many dout at once (vmap)
            differentiable = gradients_with_gradients(dout, q, k, v, sinks, sequences, scale=scale, window=window)
            return *differentiable, None, None, None
        # What sequences that share a prompt add to its gradients is not rounded each time.
        summed, dout = lse.dtype if sequences.prefixes else q.dtype, _with_dense_rows(dout)
        dq, dk, dv = (torch.empty_like(x, dtype=summed, memory_format=torch.contiguous_format) for x in (q, k, v))
        pieces = split_by_sequence(sequences.lengths, dout, q, k, v, out, lse, dq, dk, dv)
        for dout_, q_, k_, v_, out_, lse_, *results in pieces:
            length = lse_.shape[2]
            by_matmuls = q.dtype == torch.bfloat16 and length >= MATMULS_FROM and scale > 0
            if by_matmuls and not 0 < window < length:
                gradients = gradients_by_matmuls(dout_, q_, k_, v_, out_, lse_, scale=scale)
            else:
                dout_, q_, k_, v_, out_ = (x.to(lse.dtype) for x in (dout_, q_, k_, v_, out_))
                gradients = _backward(dout_, q_, k_, v_, out_, lse_, scale=scale, window=window)
            for result, gradient in zip(results, gradients):
                result.copy_(gradient)
        for prompt, branches in branches_of(sequences, together=not window):
            dout_, q_, out_ = (x.to(lse.dtype) for x in views(branches, dout, q, out))
            k_, v_ = (x.to(lse.dtype) for x in views(prompt, k, v))
            (lse_,) = views(branches, lse)
            gradients = backward_of_prompt(dout_, q_, k_, v_, out_, lse_, scale=scale, window=window)
            for total, gradient in zip((*views(branches, dq), *views(prompt, dk, dv)), gradients):
                total += gradient
        dsinks = gradient_of_sinks(dout, out, lse, sinks) if ctx.needs_input_grad[3] else None
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, None, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor]:
    """Computes one sequence: q (1, H, L, D), k and v (1, K, L, D) to (1, H, L, D) and the log-sum-exp (1, H, L)."""
    length = q.shape[2]
    size, sees = _chunks(length, window, FORWARD_CHUNK)
    if not size:
        return flash_forward(q, k, v, scale=scale)
    band, _ = _bands(size, sees, q.dtype)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
    for start in range(0, length, size):
        stop, first = min(start + size, length), max(start - sees + 1, 0)
        unseen = sees - 1 - (start - first)  # keys of the band that lie before the sequence
        mask = band[: stop - start, unseen : sees - 1 + stop - start]
        queries, keys = slice(start, stop), slice(first, stop)
        out[:, :, queries], lse[:, :, queries] = flash_forward(
            q[:, :, queries], k[:, :, keys], v[:, :, keys], causal=False, mask=mask, scale=scale
        )
    return out, lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes dq, dk and dv of one sequence."""
    length = q.shape[2]
    size, sees = _chunks(length, window, BACKWARD_CHUNK)
    if not size:
        return flash_backward(dout, q, k, v, out, lse, scale=scale)
    _, band = _bands(size, sees, q.dtype)
    dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    for start in range(0, length, size):
        stop = min(start + size, length)
        last = min(stop + sees - 1, length)  # the queries that see these keys end here
        queries, keys = slice(start, last), slice(start, stop)
        # Queries and keys begin with the same token, so causal attention is right unless some queries see no key here.
        mask = band[: last - start, : stop - start] if last - start > sees else None
        dq_chunk, dk[:, :, keys], dv[:, :, keys] = flash_backward(
            *(x[:, :, queries] for x in (dout, q)),
            *(x[:, :, keys] for x in (k, v)),
            *(x[:, :, queries] for x in (out, lse)),
            causal=mask is None,
            mask=mask,
            scale=scale,
        )
        dq[:, :, queries] += dq_chunk
    return dq, dk, dv


def _chunks(length: int, window: int, size: int) -> tuple[int, int]:
    """Gives the tokens per chunk and how many each token sees, itself included; zeros for one call on the sequence."""
    if 0 < window < length:
        return chunk_size(window), window
    if CHUNKED_FROM <= length <= CHUNKED_UNTIL:
        return size, CHUNKED_UNTIL
    return 0, 0


@functools.lru_cache(maxsize=16)
def _bands(size: int, sees: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Makes masks to add, 0 or -inf, for a chunk of `size` queries and for one of `size` keys.

    The first, (size, sees - 1 + size), is for keys that begin `sees - 1` tokens before the queries; the second,
    (sees - 1 + size, size), for queries that begin with the keys.
    """
    ahead = torch.arange(sees - 1 + size, device="cpu") - torch.arange(size, device="cpu")[:, None]
    for_queries = torch.zeros(ahead.shape, dtype=dtype, device="cpu").masked_fill_(
        (ahead < 0) | (ahead >= sees), -torch.inf
    )
    return for_queries, for_queries.t().contiguous()


def _with_dense_rows(x: Tensor) -> Tensor:
    """Copies x unless its last dimension has stride 1; with any other the operators return NaN."""
    return x if x.stride(-1) == 1 else x.contiguous()
