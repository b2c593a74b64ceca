"""Varlen attention on the CPU in matrix products: what PyTorch's flash operators lack, in one autograd node.

They have no softcap, no dropout, and no bias on keys that is fast. Here a chunk of queries after another gets all its
scores at once, in memory that every chunk uses again. The backward computes them again from the log-sum-exp that the
forward keeps, and draws again which weights were dropped.

In the forward, and again in the backward, with D = `Kept` / (1 - dropout):

    scores = cap(scale * (q @ k.T + bias))        weights = exp(scores - lse)        out = (weights * D) @ v
    dscores = weights * (D * (dout @ v.T) - sum(dout * out))        dcap = dscores * (1 - tanh(...) ** 2)

Powers are of two, as torch's exp is slow for what a mask hides.

Letters: T tokens of all sequences, S keys that they see, H query heads, K key/value heads, G = H / K, D head size. dx
is the gradient of x.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch.sequences import PackedSequences
from .cpu_chunks import Chunk, chunks_of, heads_first, tokens_first
from .dropped import Kept, factor_of_kept, seed_of_call
from .per_sequence import working_dtype
from .prompts import seen_keys
from .second_order import transformed
from .sinks import gradient_of_sinks, merge_sinks

_LOG2E = math.log2(math.e)
_SMALLEST = -126.0
"""Below two to this power numbers are denormal, and products with them ten times as slow."""
_LARGEST = 1e30
"""A bias beyond it hides a key as infinity would, but leaves a query that sees no other key a finite output."""


class Options(NamedTuple):
    """What one call asks for, beside its tensors."""

    sequences: PackedSequences
    scale: float
    window: int
    softcap: float
    dropout: float
    seed: int
    """From which it is drawn what is dropped."""

    def kept(self) -> Kept | None:
        return Kept(self.dropout, self.seed) if self.dropout else None


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
    """Computes `Backend.attend` where no tensor is `transformed`."""
    seed = seed_of_call() if dropout else 0
    options = Options(sequences, scale, window, softcap, dropout, seed)
    out: Tensor = _Attention.apply(q, k, v, sinks, key_bias, options)[0]
    return out


class _Row(NamedTuple):
    """The tensors of a call, heads first, in the dtype that it computes in."""

    q: Tensor
    """(K, T * G, D)."""
    k: Tensor
    """(K, S, D)."""
    v: Tensor
    """(K, S, any size)."""
    bias: Tensor | None
    """(K, 1, G, S): what is added to the scores."""
    options: Options
    chunks: tuple[Chunk, ...]

    @property
    def groups(self) -> int:
        return self.q.shape[1] // self.options.sequences.total

    def shape(self, chunk: Chunk) -> tuple[int, int, int]:
        """Returns the shape of a chunk's scores, (key heads, queries * G, keys)."""
        heads, queries, keys = ((each.stop - each.start) for each in chunk[:3])
        return heads, queries * self.groups, keys

    def rows(self, chunk: Chunk) -> tuple[slice, slice]:
        """Returns where the queries of a chunk lie in (K, T * G, ...)."""
        return chunk.heads, slice(chunk.queries.start * self.groups, chunk.queries.stop * self.groups)


def _row(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, options: Options) -> _Row:
    keys, key_heads, dtype = seen_keys(options.sequences), k.shape[1], working_dtype(q.dtype)
    bias = None
    if key_bias is not None:
        seen = keys.gather(key_bias.to(dtype).clamp(-_LARGEST, _LARGEST).t())  # (S, H)
        bias = (options.scale * seen).t().reshape(key_heads, 1, -1, seen.shape[0]).contiguous()
    chunks = tuple(chunks_of(options.sequences, options.window, key_heads, q.shape[1] // key_heads))
    q, k, v = (heads_first(x, key_heads, dtype) for x in (q, keys.gather(k), keys.gather(v)))
    return _Row(q, k, v, bias, options, chunks)


class _Attention(torch.autograd.Function):
    """Computes (T, H, size of v), and the log-sum-exp (T, H) of the scores, of q (T, H, D), k and v (T, K, ...)."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, key_bias: Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", enabled=False):
            out, lse = (tokens_first(x, len(q)) for x in _forward(_row(q, k, v, key_bias, options)))
            lse = lse.squeeze(2)
            if sinks is not None:
                merge_sinks(out.transpose(0, 1), lse.t(), sinks)
            return out.to(q.dtype), lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.options = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])  # the log-sum-exp
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
        if dout is None:  # what came after attention has no gradient
            return None, None, None, None, None, None
        q, k, v, sinks, key_bias, out, lse = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            if torch.is_grad_enabled() or transformed(dout):  # create_graph=True, or many dout at once (vmap)
                gradients = _gradients_with_gradients(dout, q, k, v, sinks, key_bias, ctx.options)
                return *gradients, None, None
            row, keys = _row(q, k, v, key_bias, ctx.options), seen_keys(ctx.options.sequences)
            dq, dk, dv = _backward(row, *_of_queries(dout, out, lse, k.shape[1]))
            of_keys = (keys.add_up(tokens_first(dx, keys.total), len(x)).to(x.dtype) for dx, x in ((dk, k), (dv, v)))
            dsinks = gradient_of_sinks(dout, out, lse, sinks) if ctx.needs_input_grad[3] else None
            return tokens_first(dq, len(q)).to(q.dtype), *of_keys, dsinks, None, None


def _of_queries(dout: Tensor, out: Tensor, lse: Tensor, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dout (K, T * G, size of v), sum(dout * out) and the log-sum-exp, to the base of 2, (K, T * G, 1) each."""
    dtype = lse.dtype
    dout = dout.to(dtype)
    delta = (dout * out.to(dtype)).sum(-1, keepdim=True)
    each = (dout, delta, lse.unsqueeze(2) * _LOG2E)
    dout, delta, lse = (heads_first(x, key_heads, dtype) for x in each)
    return dout, delta, lse


class _Space:
    """Memory for the scores of any one chunk, several times."""

    def __init__(self, row: _Row, blocks: int):
        largest = max(math.prod(row.shape(chunk)) for chunk in row.chunks)
        self._row, self._memory = row, [row.q.new_empty(largest) for _ in range(blocks)]

    def blocks(self, chunk: Chunk) -> list[Tensor]:
        shape = self._row.shape(chunk)
        return [each[: math.prod(shape)].view(shape) for each in self._memory]


def _scores(row: _Row, chunk: Chunk, scores: Tensor, capped: Tensor) -> Tensor:
    """Computes the scores of a chunk, to the base of 2, in one of two blocks of memory, which may be the same.

    Without a softcap they are in the first. With one they are in the second, and the first has tanh(...).
    """
    softcap = row.options.softcap
    factor = row.options.scale / softcap if softcap else row.options.scale * _LOG2E
    q, k = row.q[row.rows(chunk)], row.k[chunk.heads, chunk.keys].transpose(1, 2)
    torch.baddbmm(scores.new_empty(()), q, k, beta=0, alpha=factor, out=scores)
    if row.bias is not None:
        bias = row.bias[chunk.heads, ..., chunk.keys] * (1 / softcap if softcap else _LOG2E)
        scores.view(scores.shape[0], -1, row.groups, scores.shape[2]).add_(bias)
    if softcap:
        scores = torch.mul(scores.tanh_(), softcap * _LOG2E, out=capped)
    return chunk.hide(scores)


def _exp2(scores: Tensor, row: _Row) -> Tensor:
    """Computes two to the power of scores, in place; a bias makes many so small that they slow everything down."""
    return (scores if row.bias is None else torch.threshold_(scores, _SMALLEST, -torch.inf)).exp2_()


def _forward(row: _Row) -> tuple[Tensor, Tensor]:
    """Computes (K, T * G, size of v), and the log-sum-exp of the scores (K, T * G, 1)."""
    kept, factor = row.options.kept(), factor_of_kept(row.options.dropout)
    out = row.q.new_empty(*row.q.shape[:2], row.v.shape[2])
    lse = row.q.new_empty(*row.q.shape[:2], 1)
    space = _Space(row, 1)
    for chunk in row.chunks:
        rows, (block,) = row.rows(chunk), space.blocks(chunk)
        scores = _scores(row, chunk, block, block)
        largest = scores.amax(-1, keepdim=True)
        weights = _exp2(scores.sub_(largest), row)
        total = weights.sum(-1, keepdim=True)
        if kept is not None:
            kept.drop(weights, weights)
        torch.bmm(weights, row.v[chunk.heads, chunk.keys], out=out[rows])
        out[rows] *= factor / total
        torch.add(largest / _LOG2E, total.log(), out=lse[rows])
    return out, lse


def _backward(row: _Row, dout: Tensor, delta: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes dq (K, T * G, D), dk and dv (K, S, ...) from what `_of_queries` returns."""
    options, kept = row.options, row.options.kept()
    dout = dout * factor_of_kept(options.dropout) if kept else dout
    dq, dk, dv = torch.empty_like(row.q), torch.zeros_like(row.k), torch.zeros_like(row.v)
    space = _Space(row, 2 + bool(options.softcap) + (kept is not None))
    for chunk in row.chunks:
        rows, keys, blocks = row.rows(chunk), (chunk.heads, chunk.keys), space.blocks(chunk)
        scores, dscores, last = blocks[0], blocks[1], blocks[-1]
        weights = _exp2(_scores(row, chunk, scores, blocks[2] if options.softcap else scores).sub_(lse[rows]), row)
        torch.bmm(dout[rows], row.v[keys].transpose(1, 2), out=dscores)
        used = weights
        if kept is None:
            dscores.sub_(delta[rows]).mul_(weights)
        else:
            used = kept.drop(weights, last)
            dscores.mul_(used).addcmul_(weights, delta[rows], value=-1)
        if options.softcap:
            dscores.addcmul_(dscores, scores.square_(), value=-1)  # scores are tanh(...) here
        dv[keys].baddbmm_(used.transpose(1, 2), dout[rows])
        dk[keys].baddbmm_(dscores.transpose(1, 2), row.q[rows], alpha=options.scale)
        torch.baddbmm(dq.new_empty(()), dscores, row.k[keys], beta=0, alpha=options.scale, out=dq[rows])
    return dq, dk, dv


def _gradients_with_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, key_bias: Tensor | None, options: Options
) -> list[Tensor | None]:
    """Computes dq, dk, dv and dsinks by operations that autograd follows; all scores are in memory meanwhile."""
    with torch.enable_grad():
        out = _written_out(_row(q, k, v, key_bias, options), sinks).to(dout.dtype)
    inputs = [q, k, v, sinks]
    differentiated = [x for x in inputs if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(out, differentiated, dout, create_graph=True))
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]


def _written_out(row: _Row, sinks: Tensor | None) -> Tensor:
    """Computes what `_forward` does, (T, H, size of v), without writing over anything."""
    kept, outputs = row.options.kept(), []
    for _, chunks in itertools.groupby(row.chunks, key=lambda chunk: chunk.queries.start):
        outputs.append(torch.cat([_written_out_chunk(row, chunk, sinks, kept) for chunk in chunks]))
    return tokens_first(torch.cat(outputs, dim=1), row.options.sequences.total)


def _written_out_chunk(row: _Row, chunk: Chunk, sinks: Tensor | None, kept: Kept | None) -> Tensor:
    """Computes one chunk, (key heads, queries * G, size of v)."""
    options, keys = row.options, (chunk.heads, chunk.keys)
    scores = options.scale * row.q[row.rows(chunk)] @ row.k[keys].transpose(1, 2)
    if row.bias is not None:
        by_head = scores.unflatten(1, (-1, row.groups)) + row.bias[chunk.heads, ..., chunk.keys]
        scores = by_head.flatten(1, 2)
    scores = options.softcap * (scores / options.softcap).tanh() if options.softcap else scores
    scores = scores + chunk.hide(torch.zeros_like(scores))
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        of_heads = sinks.to(scores.dtype).view(-1, 1, row.groups)[chunk.heads]
        column = of_heads.expand(-1, scores.shape[1] // row.groups, -1).reshape(*scores.shape[:2], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    if kept is not None:
        weights = weights * kept.drop(
            torch.full_like(scores, factor_of_kept(options.dropout)), torch.empty_like(scores)
        )
    return weights @ row.v[keys]
