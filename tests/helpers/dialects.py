"""Batches that say in some of all ways where their examples end, and what they say, read without the library."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from padfree_patch import PackedSequences, versions

LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "packed_sequences", "max_length_q", "max_length_k")
FORMS = ("position_ids", "attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "packed_sequences")
DTYPES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
)
MOST_ROWS, MOST_TOKENS = 3, 20

ANY_POSITIONS = versions.transformers(">=4.38")
"""Before, Llama has angles for as many positions as a text has tokens: upstream can't run others."""

Spans = list[tuple[int, int]]
"""Where the real sequences of a batch begin, its rows end to end, and where they end."""


@dataclasses.dataclass(frozen=True)
class Batch:
    shape: tuple[int, int]
    said: dict[str, Any]
    """What the call is given beside the tokens."""
    wrong: str | None
    """What is wrong with it; None if it must be served."""


@st.composite
def batches(draw, wrongs=(None, None, "disagrees", "dtype", "shape", "value")) -> Batch:
    rows, tokens = draw(st.integers(1, MOST_ROWS)), draw(st.integers(1, MOST_TOKENS))
    partition, other = (tuple(draw(_partitions(tokens)) for _ in range(rows)) for _ in range(2))
    wrong = draw(st.sampled_from(wrongs))
    forms = sorted(draw(st.sets(st.sampled_from(FORMS), min_size=1 + (wrong == "disagrees"), max_size=3)))
    padded = [len(row) > 1 and "seq_idx" not in forms and draw(st.booleans()) for row in partition]
    said: dict[str, Any] = {}
    for form in forms:
        of = other if wrong == "disagrees" and form == forms[0] else partition
        said[form] = _form(draw, form, of, padded, jumps=len(forms) > 1 and ANY_POSITIONS)
    if "attention_mask" not in said and (any(padded) or draw(st.booleans())):
        mask = torch.stack([_numbers(row, is_padded).clamp(max=1) for row, is_padded in zip(partition, padded)])
        said["attention_mask"] = mask.to(draw(st.sampled_from([torch.int64, torch.bool, torch.float32])))
    if {"cu_seq_lens_q", "cu_seq_lens_k"} & said.keys() and draw(st.booleans()):
        said["max_length_q"] = max(max(row) for row in partition + other) + draw(st.integers(0, 2))
    if wrong in SPOILERS:
        name = draw(st.sampled_from([name for name, value in said.items() if isinstance(value, Tensor)] or [""]))
        if name:
            said[name] = SPOILERS[wrong](draw, said[name])
    return Batch((rows, tokens), said, wrong)


@st.composite
def _partitions(draw, tokens: int) -> tuple[int, ...]:
    cuts = draw(st.sets(st.integers(1, tokens), max_size=4)) - {tokens}
    return tuple(end - begin for begin, end in itertools.pairwise([0, *sorted(cuts), tokens]))


def _form(draw, form: str, partition: tuple[tuple[int, ...], ...], padded: list[bool], *, jumps: bool) -> Any:
    flat = [length for row in partition for length in row]
    if form == "position_ids":
        return torch.tensor([_positions(draw, row, jumps=jumps) for row in partition])
    if form == "attention_mask":
        return torch.stack([_numbers(*each) for each in zip(partition, padded)])
    if form == "seq_idx":
        numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in partition]
        return torch.stack(numbers).to(draw(st.sampled_from([torch.int32, torch.int64])))
    if form == "packed_sequences":
        return PackedSequences.from_lengths(flat)
    repeats = [sum(flat)] * draw(st.sampled_from([0, 0, 3]))
    return torch.tensor([0, *itertools.accumulate(flat), *repeats], dtype=torch.int32)


def _positions(draw, row: tuple[int, ...], *, jumps: bool) -> list[int]:
    """Makes positions that break where a sequence begins; inside one they may jump ahead, where others say its end."""
    found: list[int] = []
    for length in row:
        start = draw(st.sampled_from([0, 0, 0, 3, 30] if ANY_POSITIONS else [0]))
        start += bool(found) and start == found[-1] + 1
        at, by = (draw(st.integers(1, 2 * length)), draw(st.integers(1, 9))) if jumps else (length, 0)
        found += [start + i + (by if i >= at else 0) for i in range(length)]
    return found


def _numbers(row: tuple[int, ...], is_padded: bool) -> Tensor:
    """Makes segment numbers from 1 on; those of a last sequence that is padding are 0."""
    numbers = torch.arange(1, len(row) + 1)
    numbers[-1] *= not is_padded
    return numbers.repeat_interleave(torch.tensor(row))


def _other_dtype(draw, value: Tensor) -> Tensor:
    return value.to(draw(st.sampled_from(DTYPES)))


def _other_shape(draw, value: Tensor) -> Tensor:
    changes = (
        lambda x: x[..., :-1],
        lambda x: torch.cat([x, x[..., -1:]], -1),
        lambda x: x[None],
        lambda x: x.mT if x.dim() > 1 else x[:, None],
        lambda x: x.flatten(),
        lambda x: x[:1],
        lambda x: x[..., None, :],
    )
    return draw(st.sampled_from(changes))(value)


def _other_value(draw, value: Tensor) -> Tensor:
    odd = draw(st.sampled_from([-1, 0, 1, 2, 300, 2**40, 0.5, float("nan"), float("inf")]))
    changed = value.double() if isinstance(odd, float) else value.long()
    changed = changed.clone()
    changed.view(-1)[draw(st.integers(0, value.numel() - 1))] = odd
    return changed


SPOILERS = {"dtype": _other_dtype, "shape": _other_shape, "value": _other_value}


def meaning(batch: Batch) -> Spans | None:
    """Returns the real sequences that a batch speaks of; None if it contradicts itself, or is no batch."""
    try:
        return _meaning(batch)
    except (ValueError, TypeError, RuntimeError, IndexError):  # of another shape, or no numbers
        return None


def _meaning(batch: Batch) -> Spans | None:
    rows, tokens = batch.shape
    total = rows * tokens
    said = {name: each for name, each in batch.said.items() if not name.startswith("max_length")}
    real = [True] * total
    begins: list[set[int]] = []
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if name in said:
            values = said[name].flatten().tolist()
            if values[0] != 0 or values[-1] != total or values != sorted(values) or len(set(values)) < 2:
                return None
            begins.append(set(values[:-1]) - {total})
    if "packed_sequences" in said:
        begins.append({0, *itertools.accumulate(said["packed_sequences"].lengths)} - {total})
    if "seq_idx" in said:
        begins.append(_changes(said["seq_idx"].reshape(rows, tokens).tolist()))
    if "attention_mask" in said:
        numbers = said["attention_mask"].reshape(rows, tokens).tolist()
        real = [bool(number) for row in numbers for number in row]
        if max(max(row) for row in numbers) > 1:
            begins.append(_changes(numbers) | {i for i in _changes([real])})
    positions = said.get("position_ids")
    if positions is not None:  # of one row, they are those of all
        positions = (positions.expand if tuple(positions.shape) == (1, tokens) else positions.reshape)(
            rows, tokens
        ).tolist()
    if not begins:
        begins.append({i for i in range(total) if i % tokens == 0 or (positions and _breaks(positions, i, tokens))})
    if not {*range(0, total, tokens)} <= begins[0]:
        return None
    pairs = [(i, j) for i, j in itertools.pairwise(k for k in range(total) if real[k]) if i // tokens == j // tokens]
    numbers = [list(itertools.accumulate(i in each for i in range(total))) for each in begins]
    if any([n[i] == n[j] for i, j in pairs] != [numbers[0][i] == numbers[0][j] for i, j in pairs] for n in numbers):
        return None
    owner = numbers[0]
    inside = [i for i in range(total) if i % tokens and real[i] and real[i - 1]]
    if positions and any(_breaks(positions, i, tokens) < (owner[i] != owner[i - 1]) for i in inside):
        return None
    owned = [[i for i in range(total) if real[i] and owner[i] == number] for number in sorted({*owner})]
    spans = [(each[0], each[-1] + 1) for each in owned if each]
    return spans if sum(end - begin for begin, end in spans) == sum(real) else None  # a hole in the mask


def _changes(numbers: list[list[Any]]) -> set[int]:
    flat, tokens = [each for row in numbers for each in row], len(numbers[0])
    return {i for i in range(len(flat)) if i % tokens == 0 or flat[i] != flat[i - 1]}


def _breaks(positions: list[list[Any]], i: int, tokens: int) -> bool:
    row, token = divmod(i, tokens)
    return positions[row][token] != positions[row][token - 1] + 1
