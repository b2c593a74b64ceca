"""Rotary embeddings of a packed row: every sequence gets those that it would get alone.

Dynamic NTK and longrope choose their frequencies by the longest position, old versions by the row's total length, and
old dynamic NTK never goes back once it has grown. So a packed row would be rotated by its total, and a sequence by its
longest neighbour. Here upstream's own rotary runs once per length, each time as a fresh module.

Until 4.37 (in some models 4.47) a rotary takes the row's length, `seq_len`, and the attention picks the rows of its
tables by position_ids; later ones take the position_ids themselves.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .boundaries import PackedBatch


def depends_on_length(module: nn.Module) -> bool:
    """Whether a module is a rotary that computes other frequencies for a longer sequence."""
    name = type(module).__name__
    kind = f"{name} {getattr(module, 'rope_type', '')}".lower()
    by_length = "dynamic" in kind or "longrope" in kind or hasattr(module, "long_factor")  # Phi-3's su and yarn
    return "RotaryEmbedding" in name and by_length


def positions_for(attention: nn.Module, batch: PackedBatch) -> Tensor:
    """The position_ids (B, T) to call an attention module with, so that its rotary finds the rows of its tables."""
    rotary = getattr(attention, "rotary_emb", None)
    if rotary is None or "position_ids" in _parameters(type(rotary).forward):
        return batch.position_ids
    if depends_on_length(rotary):  # `rotary_forward` lays its tables out per token
        tokens = torch.arange(batch.sequences.total, device=batch.position_ids.device)
        return tokens.view(batch.position_ids.shape)
    # The tables have as many rows as the packed row has tokens. Rope sees differences of positions only, so that a
    # sequence which starts elsewhere is the same from 0 on; alone, upstream fails on it (IndexError).
    return batch.positions_from_zero


@contextmanager
def as_new(model: nn.Module) -> Iterator[None]:
    """While a model runs: its length-dependent rotaries are as they were before their first call, afterwards as now."""
    rotaries = [module for module in model.modules() if depends_on_length(module)]
    saved = [dict(vars(rotary)) for rotary in rotaries]
    try:
        for rotary in rotaries:
            vars(rotary).update(vars(_fresh(rotary, next(rotary.buffers()).device)))
        yield
    finally:
        for rotary, own in zip(rotaries, saved):
            vars(rotary).clear()
            vars(rotary).update(own)


_current = threading.local()


@contextmanager
def rotating(batch: PackedBatch) -> Iterator[None]:
    """While upstream code runs that calls a rotary: tells it whose positions it rotates."""
    outer = getattr(_current, "batch", None)
    _current.batch = batch
    try:
        yield
    finally:
        _current.batch = outer


@torch.compiler.disable
def rotary_forward(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answers the forward of a length-dependent rotary: (cos, sin), for a packed batch each sequence's own."""
    batch: PackedBatch | None = getattr(_current, "batch", None)
    if batch is None:
        return original(*args, **kwargs)
    call = inspect.signature(original).bind(*args, **kwargs).arguments
    if "query" in call:
        return _rotated(original, call, batch)
    rotary, x = call["self"], call["x"]
    lengths = list(batch.sequences.lengths)
    if "position_ids" not in _parameters(original):
        longest_short = min(unscaled_length(rotary), batch.sequences.max_seqlen)
        tables = {
            length: original(_fresh(rotary, x.device), x, seq_len=length)
            for length in {max(length, longest_short) for length in lengths}
        }
        picked = [tables[max(length, longest_short)] for length in lengths]
        rows = [[table[i][..., :n, :] for table, n in zip(picked, lengths)] for i in (0, 1)]
        return torch.cat(rows[0], dim=-2), torch.cat(rows[1], dim=-2)  # (..., B * T, D) each

    pieces = batch.position_ids.reshape(-1).split(lengths)
    longest = [max(last + 1, unscaled_length(rotary)) for last in batch.last_positions]
    rotated: list[tuple[Tensor, Tensor]] = [()] * len(pieces)  # type: ignore[list-item]
    for length in set(longest):
        members = [i for i, each in enumerate(longest) if each == length]
        positions = torch.cat([pieces[i] for i in members]).unsqueeze(0)
        known = {"seq_len": length} if "seq_len" in _parameters(original) else {}  # or it would ask the device
        cos, sin = original(_fresh(rotary, x.device), x, positions, **known)  # (1, tokens, D) each
        sizes = [lengths[i] for i in members]
        for i, c, s in zip(members, cos.split(sizes, dim=1), sin.split(sizes, dim=1)):
            rotated[i] = (c, s)
    shape = (*batch.position_ids.shape, -1)
    return tuple(torch.cat([each[i] for each in rotated], dim=1).view(shape) for i in (0, 1))


def _rotated(original: Callable[..., Any], call: dict[str, Any], batch: PackedBatch) -> tuple[Tensor, ...]:
    """What Falcon's rotary of 4.35 gives: query and key, (B * heads, T, D) each, rotated sequence by sequence."""
    rotary, rows = call["self"], batch.position_ids.shape[0]
    lengths = list(batch.sequences.lengths)
    by_row = [x.unflatten(0, (rows, -1)).transpose(0, 1) for x in (call["query"], call["key"])]  # (heads, B, T, D) each
    pieces = zip(
        *(x.flatten(1, 2).split(lengths, dim=1) for x in by_row), batch.positions_from_zero.reshape(-1).split(lengths)
    )
    rotated = zip(*(original(_fresh(rotary, q.device), q, k, 0, positions.unsqueeze(0)) for q, k, positions in pieces))
    joined = (torch.cat(each, dim=1).unflatten(1, (rows, -1)) for each in rotated)
    return tuple(x.transpose(0, 1).flatten(0, 1) for x in joined)


def _fresh(rotary: nn.Module, device: torch.device) -> nn.Module:
    """A rotary as it was before its first call: upstream's keep what the longest sequence so far made of them."""
    if hasattr(rotary, "long_factor"):  # Phi-3's of 4.41 to 4.47 compute all anew on each call
        return copy.copy(rotary)
    names = [name for name in _parameters(type(rotary).__init__) if name not in ("self", "device")]
    built: nn.Module = type(rotary)(**{name: getattr(rotary, name) for name in names if hasattr(rotary, name)})
    buffers = [buffer.dtype for buffer in rotary.buffers() if buffer.is_floating_point()]
    return built.to(device, min(buffers, key=lambda dtype: dtype.itemsize))  # model.half() casts the frequencies too


def unscaled_length(rotary: nn.Module) -> int:
    """Tokens up to which all sequences share the same frequencies."""
    config = getattr(rotary, "config", None)
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    known = (
        getattr(rotary, "original_max_seq_len", None),
        getattr(rotary, "max_position_embeddings", None),
        getattr(rotary, "original_max_position_embeddings", None),
        getattr(config, "original_max_position_embeddings", None),
        scaling.get("original_max_position_embeddings"),
    )
    return min(int(each) for each in known if each)


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
