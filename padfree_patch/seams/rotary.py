"""Rotary embeddings of a packed row: every sequence gets those that it would get alone.

Dynamic NTK and longrope choose their frequencies by the longest position, old versions by the row's total length, and
old dynamic NTK never goes back once it has grown. So a packed row would be rotated by its total, and a sequence by its
longest neighbour. Here upstream's own rotary runs once per length, each time as a fresh module.

Until 4.37 (in some models 4.47) a rotary takes the row's length, `seq_len`, and the attention picks the rows of its
tables by position_ids; later ones take the position_ids themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..batch.packed_batch import PackedBatch
from ..errors import PadfreeError
from ..registry import Patch
from ..upstream import Arguments
from ..wrapping.call import Call, signature, takes_keyword
from ..wrapping.opt_in import OptIn
from ..wrapping.seam import Seam, original_of
from .kinds import Found, check_takes
from .under_way import under_way

NAME = "rotary"


def find(model: nn.Module, patch: Patch | None = None) -> Found:
    rotaries = tuple(module for module in model.modules() if depends_on_length(module))
    for module in rotaries:
        falcons = takes_keyword(original_of(type(module).forward), "query")  # of 4.35
        check_takes(patch, module, *(("query", "key") if falcons else ("x",)))
    return Found(frozenset(Seam(type(each), "forward", concerns, answer) for each in rotaries), rotaries)


def concerns(args: tuple[object, ...], kwargs: Arguments) -> bool:
    return under_way.batch is not None and OptIn.of(args[0]) is not None


def depends_on_length(module: nn.Module) -> bool:
    """Whether a module is a rotary that computes other frequencies for a longer sequence."""
    name = type(module).__name__
    kind = f"{name} {getattr(module, 'rope_type', '')}".lower()
    by_length = "dynamic" in kind or "longrope" in kind or hasattr(module, "long_factor")  # Phi-3's su and yarn
    return "RotaryEmbedding" in name and by_length


def positions_for(attention: nn.Module, batch: PackedBatch) -> Tensor:
    """Returns the position_ids (B, T) with which the rotary of an attention module finds the rows of its tables."""
    rotary = getattr(attention, "rotary_emb", None)
    if rotary is None or "position_ids" in signature(original_of(type(rotary).forward)).parameters:
        return batch.position_ids
    if depends_on_length(rotary):  # `_tables_of_lengths` lays its tables out per token
        tokens = torch.arange(batch.sequences.total, device=batch.position_ids.device)
        return tokens.view(batch.position_ids.shape)
    # The tables have as many rows as the packed row has tokens. Rope sees differences of positions only, so that a
    # sequence which starts elsewhere is the same from 0 on; alone, upstream fails on it (IndexError), as it does on one
    # whose positions jump beyond its length.
    return batch.positions_from_zero


@contextmanager
def as_new(model: nn.Module) -> Iterator[None]:
    """Makes length-dependent rotaries as they were before their first call, and afterwards as they are now."""
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


@torch.compiler.disable
def answer(call: Call) -> Tensor | tuple[Tensor, ...]:
    """Answers the forward of a length-dependent rotary: its tables, for a packed batch each sequence's own."""
    batch = under_way.batch
    assert batch is not None  # or the call would not have concerned us
    if call.takes("query"):
        return _rotated_pair(call, batch)
    if call.takes("position_ids"):
        return _tables_of_positions(call, batch)
    return _tables_of_lengths(call, batch)


def _tables_of_positions(call: Call, batch: PackedBatch) -> Tensor | tuple[Tensor, ...]:
    """Returns (cos, sin), (B, T, D) each, of a rotary that takes position_ids: one call per length that matters.

    Some take the type of a layer as well, and some give complex numbers instead of the two tables.
    """
    rotary, x, lengths = call.module, call.arguments["x"], list(batch.sequences.lengths)
    pieces = batch.position_ids.reshape(1, -1).split(lengths, dim=1)
    longest = [max(last + 1, unscaled_length(rotary)) for last in batch.last_positions]
    others = {name: value for name, value in call.arguments.items() if value is not rotary}
    rotated: dict[int, tuple[Tensor, ...]] = {}
    made: Tensor | tuple[Tensor, ...] = ()
    for length in set(longest):
        members = [i for i, each in enumerate(longest) if each == length]
        positions = torch.cat([pieces[i] for i in members], dim=1)
        known = {"seq_len": length} if call.takes("seq_len") else {}  # or it would ask the device
        made = call.original(_fresh(rotary, x.device), **{**others, "position_ids": positions, **known})
        tables = (made,) if isinstance(made, Tensor) else made  # (1, tokens, D) each
        sizes = [lengths[i] for i in members]
        rotated |= dict(zip(members, zip(*(each.split(sizes, dim=1) for each in tables))))
    in_order = zip(*(rotated[i] for i in range(len(pieces))))
    whole = [torch.cat(each, dim=1).view(*batch.position_ids.shape, -1) for each in in_order]
    return whole[0] if isinstance(made, Tensor) else tuple(whole)


def _tables_of_lengths(call: Call, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Returns (cos, sin), (..., B * T, D) each, of a rotary that takes `seq_len`: one call per length that matters."""
    rotary, x, lengths = call.module, call.arguments["x"], list(batch.sequences.lengths)
    _check_steps(rotary, batch)
    longest_short = min(unscaled_length(rotary), batch.sequences.max_seqlen)
    tables = {
        length: call.original(_fresh(rotary, x.device), x, seq_len=length)
        for length in {max(length, longest_short) for length in lengths}
    }
    picked = [tables[max(length, longest_short)] for length in lengths]
    cos, sin = ([table[part][..., :n, :] for table, n in zip(picked, lengths)] for part in (0, 1))
    return torch.cat(cos, dim=-2), torch.cat(sin, dim=-2)


def _check_steps(rotary: nn.Module, batch: PackedBatch) -> None:
    """Raises PadfreeError for positions that jump inside a sequence, where a rotary counts its tokens itself."""
    if batch.steps_by_one:
        return
    counted = batch.sequences.position_ids().view_as(batch.position_ids)
    if batch.steps_by_one is False or not torch.equal(batch.positions_from_zero, counted):
        raise PadfreeError(
            f"position_ids jump inside an example, but {type(rotary).__name__} of this transformers version counts the "
            "tokens itself; give positions without jumps, or update transformers"
        )


def _rotated_pair(call: Call, batch: PackedBatch) -> tuple[Tensor, ...]:
    """Returns what Falcon's rotary of 4.35 gives: query and key, (B * heads, T, D) each, rotated by sequence."""
    rotary, rows = call.module, batch.position_ids.shape[0]
    lengths = list(batch.sequences.lengths)
    by_row = [call.arguments[x].unflatten(0, (rows, -1)).transpose(0, 1) for x in ("query", "key")]  # (heads, B, T, D)
    pieces = zip(
        *(x.flatten(1, 2).split(lengths, dim=1) for x in by_row), batch.positions_from_zero.reshape(-1).split(lengths)
    )
    rotated = zip(
        *(call.original(_fresh(rotary, q.device), q, k, 0, positions.unsqueeze(0)) for q, k, positions in pieces)
    )
    joined = (torch.cat(each, dim=1).unflatten(1, (rows, -1)) for each in rotated)
    return tuple(x.transpose(0, 1).flatten(0, 1) for x in joined)


def _fresh(rotary: nn.Module, device: torch.device) -> nn.Module:
    """Returns a rotary as it was before its first call: upstream's keep what the longest sequence made of them.

    What it has learned is its own.
    """
    if hasattr(rotary, "long_factor"):  # Phi-3's of 4.41 to 4.47 compute all anew on each call
        return copy.copy(rotary)
    names = [name for name in signature(type(rotary).__init__).parameters if name not in ("self", "device")]
    built: nn.Module = type(rotary)(**{name: getattr(rotary, name) for name in names if hasattr(rotary, name)})
    buffers = [buffer.dtype for buffer in rotary.buffers() if buffer.is_floating_point()]
    built.to(device, min(buffers, key=lambda dtype: dtype.itemsize))  # model.half() casts the frequencies too
    built._parameters.update(rotary._parameters)  # Mistral Large 4 trains some
    built._modules.update(rotary._modules)
    return built


def unscaled_length(rotary: nn.Module) -> int:
    """Returns the tokens up to which all sequences share the same frequencies."""
    config = getattr(rotary, "config", None)
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_layer_type = [each for each in scaling.values() if isinstance(each, dict)]
    known = (
        getattr(rotary, "original_max_seq_len", None),
        getattr(rotary, "max_position_embeddings", None),
        getattr(rotary, "original_max_position_embeddings", None),
        getattr(config, "original_max_position_embeddings", None),
        *(each.get("original_max_position_embeddings") for each in (scaling, *by_layer_type)),
    )
    return min(int(each) for each in known if each)
