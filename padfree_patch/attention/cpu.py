"""Varlen attention on the CPU by the flash operators behind `scaled_dot_product_attention`, in one autograd node.

One node, so that autograd's graph does not grow with the number of sequences. Inside, the operators are called for each
sequence, with two differences to what the public function would do:

- The operators also compute most of the scores that causality hides, unless a sequence is long. So sequences of up to
  `CHUNKED_UNTIL` tokens are cut into chunks of queries (forward) and of keys (backward), each against what it can see.
  Sliding windows are the same chunks with less to see.
- In bfloat16 and float16 the operators are slow on short sequences, so each sequence goes through float32. The backward
  of a longer bfloat16 sequence is matrix products in bfloat16 (`_bfloat16_backward`).

The operators are private to PyTorch: `works` finds out whether they are here and right; `sdpa` does without if not.

Letters: T tokens of all sequences, L of one, H query heads, K key/value heads, G = H / K, D head size. of_x is the
gradient of x.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNKED_FROM, CHUNKED_UNTIL = 129, 2048
"""Tokens of sequences that chunks pay for: there is little to skip in shorter ones, and longer ones skip by themselves.

Measured, like the other numbers here, on two x86 cores with AVX-512: benchmarks/attention.py.
"""
FORWARD_CHUNK, BACKWARD_CHUNK = 64, 128
"""Queries and keys per chunk."""
MATMULS_FROM = 193
"""Tokens from which `_bfloat16_backward` is the faster one."""
MATMUL_CHUNK = 128
"""Queries per matrix product in it."""


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], *, scale: float, window: int = 0) -> Tensor:
    """Causal attention inside each sequence; arguments and result as in `padfree_patch.attention.sdpa.attend`.

    Only where `works`; v has the shape of k. Gradients can be taken once (no double backward).
    """
    q, k, v = (_rows(x) for x in (q, k, v))
    out: Tensor = _Attention.apply(q, k, v, lengths, scale, window)[0]
    return out


@functools.cache
def works() -> bool:
    """Whether this PyTorch has the operators as they are called here, tried on three tokens with shared keys."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, of_out = (torch.randn(1, heads, 3, 8, generator=generator) for heads in (2, 1, 1, 2))
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        scores = 0.5 * leaves[0] @ leaves[1].transpose(2, 3)
        expected = scores.masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), -torch.inf).softmax(-1) @ leaves[2]
        gradients = torch.autograd.grad(expected, leaves, of_out)
    try:
        with torch.no_grad():
            out, lse = _flash_forward(q, k, v, 0.0, True, scale=0.5)
            found = (out, *_flash_backward(of_out, q, k, v, out, lse, 0.0, True, scale=0.5))
    except (AttributeError, RuntimeError, TypeError):
        return False
    close = (x.shape == y.shape and torch.allclose(x, y, atol=1e-5) for x, y in zip(found, (expected, *gradients)))
    return all(close) and lse.shape == (1, 2, 3)


class _Attention(torch.autograd.Function):
    """q (T, H, D), k and v (T, K, D) to (T, H, D) and the log-sum-exp (T, H) of the scores, which has no gradient."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float, window: int
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[:2], dtype=_working(q.dtype))
        for q_, k_, v_, out_, lse_ in _pieces(lengths, q, k, v, out, lse):
            result, its_lse = _forward(q_.to(lse.dtype), k_.to(lse.dtype), v_.to(lse.dtype), scale, window)
            out_.copy_(result)
            lse_.copy_(its_lse)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, *ctx.options = inputs
        ctx.save_for_backward(q, k, v, *output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: Tensor, of_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        lengths, scale, window = ctx.options
        of_q, of_k, of_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        inputs = _pieces(lengths, _rows(of_out), q, k, v, out)
        for needed, its_lse, results in zip(inputs, _pieces(lengths, lse), _pieces(lengths, of_q, of_k, of_v)):
            length = its_lse[0].shape[2]
            by_matmuls = q.dtype == torch.bfloat16 and length >= MATMULS_FROM and scale > 0
            if by_matmuls and not 0 < window < length:
                gradients = _bfloat16_backward(*needed, *its_lse, scale=scale)
            else:
                gradients = _backward(*(x.to(lse.dtype) for x in needed), *its_lse, scale=scale, window=window)
            for gradient, result in zip(gradients, results):
                result.copy_(gradient)
        return of_q, of_k, of_v, None, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor]:
    """One sequence: q (1, H, L, D), k and v (1, K, L, D) to (1, H, L, D) and the log-sum-exp (1, H, L)."""
    length = q.shape[2]
    size, sees = _chunks(length, window, FORWARD_CHUNK)
    if not size:
        return _flash_forward(q, k, v, 0.0, True, scale=scale)
    band, _ = _bands(size, sees, q.dtype)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
    for start in range(0, length, size):
        stop, first = min(start + size, length), max(start - sees + 1, 0)
        unseen = sees - 1 - (start - first)  # keys of the band that lie before the sequence
        mask = band[: stop - start, unseen : sees - 1 + stop - start]
        queries, keys = slice(start, stop), slice(first, stop)
        out[:, :, queries], lse[:, :, queries] = _flash_forward(
            q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.0, False, attn_mask=mask, scale=scale
        )
    return out, lse


def _backward(
    of_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v of one sequence."""
    length = q.shape[2]
    size, sees = _chunks(length, window, BACKWARD_CHUNK)
    if not size:
        return _flash_backward(of_out, q, k, v, out, lse, 0.0, True, scale=scale)
    _, band = _bands(size, sees, q.dtype)
    of_q, of_k, of_v = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    for start in range(0, length, size):
        stop = min(start + size, length)
        last = min(stop + sees - 1, length)  # the queries that see these keys end here
        queries, keys = slice(start, last), slice(start, stop)
        # Counted from the same token, queries and keys are plainly causal, unless some queries have gone out of sight.
        mask = band[: last - start, : stop - start] if last - start > sees else None
        of_queries, of_k[:, :, keys], of_v[:, :, keys] = _flash_backward(
            *(x[:, :, queries] for x in (of_out, q)),
            *(x[:, :, keys] for x in (k, v)),
            *(x[:, :, queries] for x in (out, lse)),
            0.0,
            mask is None,
            attn_mask=mask,
            scale=scale,
        )
        of_q[:, :, queries] += of_queries
    return of_q, of_k, of_v


def _bfloat16_backward(
    of_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of one sequence by bfloat16 matrix products, which accumulate in float32 but round their results.

    Rounded scores would be too coarse. So what FlashAttention (arXiv 2205.14135, appendix B) subtracts from products
    is subtracted inside them, before they are rounded, as two more channels that hold its upper and lower half:
    weights = exp(scale * q @ k.T - lse), of_scores = weights * (of_out @ v.T - sum(of_out * out)).
    """
    (key_heads, length), groups = k.shape[1:3], q.shape[1] // k.shape[1]
    delta = (of_out.float() * out.float()).sum(-1)  # (1, H, L)
    ones = k.new_ones(*k.shape[:3], 2)
    q_lse = torch.cat([q, *_halves(lse / -scale)], -1)[0].unflatten(0, (key_heads, groups))  # (K, G, L, D + 2)
    out_delta = torch.cat([of_out, *_halves(-delta)], -1)[0].unflatten(0, (key_heads, groups))
    k_ones, v_ones = (torch.cat([x, ones], -1)[0].transpose(1, 2) for x in (k, v))  # (K, D + 2, L)
    of_q = torch.empty_like(q)
    of_k, of_v = (torch.zeros(x.shape[1:], dtype=torch.float32) for x in (k, v))  # (K, L, D)
    unused = q.new_empty(())
    for start in range(0, length, MATMUL_CHUNK):
        stop = min(start + MATMUL_CHUNK, length)
        rows = stop - start
        q_rows, out_rows = (x[:, :, start:stop].flatten(1, 2) for x in (q_lse, out_delta))  # (K, G * rows, D + 2)
        weights = torch.baddbmm(unused, q_rows, k_ones[:, :, :stop], beta=0, alpha=scale)  # (K, G * rows, stop)
        weights[:, :, start:].unflatten(1, (groups, rows)).add_(_later(rows, q.dtype))
        weights.exp_()
        of_scores = torch.baddbmm(unused, out_rows, v_ones[:, :, :stop], beta=0, alpha=scale).mul_(weights)
        of_v[:, :stop] += weights.transpose(1, 2) @ out_rows[:, :, :-2]
        of_k[:, :stop] += of_scores.transpose(1, 2) @ q_rows[:, :, :-2]
        of_rows = of_scores @ k[0, :, :stop]  # (K, G * rows, D)
        of_q[0, :, start:stop] = of_rows.unflatten(1, (groups, rows)).flatten(0, 1)
    return of_q, of_k[None], of_v[None]


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16 (..., 1) and (..., 1) whose sum is the float32 x (...), to 16 bits."""
    upper = x.bfloat16()
    return upper[..., None], (x - upper.float()).bfloat16()[..., None]


def _chunks(length: int, window: int, size: int) -> tuple[int, int]:
    """Tokens per chunk and how many each token sees, itself included; 0 for one call on the whole sequence."""
    if 0 < window < length:
        return min(max(window // 4, 64), 256), window  # more masked work against more calls
    if CHUNKED_FROM <= length <= CHUNKED_UNTIL:
        return size, CHUNKED_UNTIL
    return 0, 0


@functools.lru_cache(maxsize=16)
def _bands(size: int, sees: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Masks to add, 0 or -inf, for a chunk of `size` queries and for one of `size` keys.

    The first, (size, sees - 1 + size), is for keys that begin `sees - 1` tokens before the queries; the second,
    (sees - 1 + size, size), for queries that begin with the keys.
    """
    ahead = torch.arange(sees - 1 + size) - torch.arange(size)[:, None]
    of_queries = torch.zeros(ahead.shape, dtype=dtype).masked_fill_((ahead < 0) | (ahead >= sees), -torch.inf)
    return of_queries, of_queries.t().contiguous()


@functools.lru_cache(maxsize=16)
def _later(rows: int, dtype: torch.dtype) -> Tensor:
    """(rows, rows) to add: -inf where a key comes after its query."""
    return torch.full((rows, rows), -torch.inf, dtype=dtype).triu_(1)


def _pieces(lengths: tuple[int, ...], *tensors: Tensor) -> Any:
    """For each sequence the views (1, heads, L, ...) of tensors (T, heads, ...)."""
    return zip(*(x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in tensors))


def _rows(x: Tensor) -> Tensor:
    """With the last dimension dense; with any other stride the operators return NaN."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _working(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def _flash_forward(*args: Any, **kwargs: Any) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(*args, **kwargs)


def _flash_backward(*args: Any, **kwargs: Any) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(*args, **kwargs)
