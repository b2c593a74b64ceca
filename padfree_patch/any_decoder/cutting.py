"""A packed row cut into its sequences, for code of upstream that runs on each, and joined again.

A sequence that goes on from a shared prompt is cut out together with the prompt, as a whole example. What comes of the
prompt's tokens is left out again: it is made where the prompt stands.

Arguments of a packed call have the T tokens of each of B rows, (B, T, ...), those of a sequence its own, (1, N, ...).
Which dimension has the tokens is told by its size; where two could, it is an error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..batch.packed_batch import PackedBatch
from ..batch.sequences import PackedSequences
from ..errors import PadfreeError
from ..seams.under_way import under_way
from ..upstream import Arguments
from .noted_mask import is_noted, number_of, recipes

Result = TypeVar("Result")


class _Place(NamedTuple):
    """Where the tokens lie that a sequence is run on."""

    number: int
    """Of the sequence."""
    row: int
    parts: tuple[tuple[int, int], ...]
    """(start, tokens) in the row: of the prompt, if the sequence goes on from one, and of its own."""
    length: int
    """Tokens in all parts."""


def _places(sequences: PackedSequences, tokens: int) -> Iterator[_Place]:
    """Yields the place of each sequence in rows of so many tokens."""
    begins = itertools.accumulate(sequences.lengths, initial=0)
    own = [(*divmod(begin, tokens), length) for begin, length in zip(begins, sequences.lengths)]
    for i, (row, start, length) in enumerate(own):
        prefix = -1 if sequences.prefixes is None else sequences.prefixes[i]
        prompt = [own[prefix][1:]] if prefix >= 0 else []
        parts = (*prompt, (start, length))
        yield _Place(i, row, parts, sum(n for _, n in parts))


class OfEach(tuple[Tensor, ...]):
    """What each sequence gave where that can't be joined, for the next module that runs on each: (1, N, ...) each.

    An indexer chooses as many keys for a token as it may, or all that a short sequence has.
    """


class Cutter:
    """Cuts the arguments of one call, and joins what the call gives for each sequence."""

    def __init__(
        self,
        batch: PackedBatch,
        module: nn.Module,
        token_dims: Mapping[str, int] | None = None,
        *,
        scores: bool = False,
    ):
        """Takes whose call it is, and the dimensions of the tokens in arguments where they are known.

        With `scores`, a tensor whose last two dimensions could both be the tokens is about scores, so both are.
        """
        self._rows, self._tokens = (int(n) for n in batch.position_ids.shape)
        self._total, self._lengths = batch.sequences.total, batch.sequences.lengths
        self._whole = batch.sequences.whole_lengths
        self._places = list(_places(batch.sequences, self._tokens))
        self._device, self._module, self._dims = batch.position_ids.device, module, token_dims or {}
        self._who, self._scores = type(module).__name__, scores
        self._masks: dict[Hashable, object] = {} if under_way.masks is None else under_way.masks

    def run(self, arguments: Arguments, run: Callable[[Arguments], Result]) -> list[Result]:
        """Runs something on each sequence's part of the arguments."""
        counts = {name: value - self._tokens for name, value in arguments.items() if self._is_count(name, value)}
        results = []
        for place in self._places:
            cut = {name: self._cut(value, place, self._dims.get(name)) for name, value in arguments.items()}
            results.append(run(cut | {name: place.length + beyond for name, beyond in counts.items()}))
        return results

    def without_prompts(self, results: Sequence[Tensor], dim: int) -> list[Tensor]:
        """Returns what each sequence gave for its own tokens, which lie in a dimension after those of its prompt."""
        pairs = zip(results, self._lengths, self._whole)
        return [each if own == whole else each.narrow(dim, whole - own, own) for each, own, whole in pairs]

    def _is_count(self, name: str, value: object) -> bool:
        """Whether an argument is the number of the row's tokens, or the position of the last one."""
        if type(value) is not int:
            return False
        last = "position" in name and value == self._tokens - 1
        return last or (value == self._tokens and any(part in name for part in ("seq", "len", "position")))

    def _cut(self, value: object, place: _Place, known: int | None) -> object:
        """Returns what belongs to one sequence."""
        length = place.length
        if isinstance(value, OfEach):
            return value[place.number]
        if isinstance(value, (tuple, torch.Size)) and len(value) > 1 and all(type(each) is int for each in value):
            return type(value)(self._shape(value, length))
        if (inside := _inside(value, lambda each: self._cut(each, place, None))) is not None:
            return inside
        if not isinstance(value, Tensor):
            return value
        if is_noted(value):
            return self._mask(number_of(value), length)
        if value.dim() == 1:  # cache_position, from 0 on
            counts = value.shape[0] in (self._tokens, self._total) and not value.is_floating_point()
            return value[:length] if counts else value
        dims = self._token_dims(value) if known is None else [known]
        if dims and self._rows > 1:
            value = self._row(value, place.row, dims[0])
        for dim in dims:
            parts = [value.narrow(dim, start, tokens) for start, tokens in place.parts]
            value = parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
        return value

    def _shape(self, sizes: Sequence[int], length: int) -> list[int]:
        cut = [length if each in (self._tokens, self._total) else each for each in sizes]
        of_rows = sizes[0] == self._rows and cut[1:] != [*sizes[1:]]
        return [1, *cut[1:]] if of_rows else cut

    def _row(self, value: Tensor, row: int, token_dim: int) -> Tensor:
        """Returns one row, (1, ...), of positions (3, 1, T); what has no dimension for rows is the same for all."""
        dims = [dim for dim in range(token_dim) if value.shape[dim] == self._rows]
        if not dims:
            return value
        return value.narrow(dims[-1] if value.dim() == 3 and token_dim == 2 else dims[0], row, 1)

    def _mask(self, number: int, length: int) -> object:
        key = number, length, self._device
        if key not in self._masks:
            self._masks[key] = recipes[number].build(length, self._device)
        return self._masks[key]

    def _token_dims(self, value: Tensor) -> list[int]:
        dims = [dim for dim in range(1, value.dim()) if value.shape[dim] == self._tokens]
        if len(dims) < 2 or (value.dim() == 3 and dims[0] == 1):
            return dims[:1]
        if not self._scores and self._tokens in _sizes_of(self._module):  # tokens by tokens, or by a head size
            raise self._ambiguous(value)
        return dims

    def _ambiguous(self, value: Tensor) -> PadfreeError:
        return PadfreeError(
            f"{self._who} is handed a tensor of shape {tuple(value.shape)}, and the {self._tokens} tokens of a row "
            "could be more than one of its dimensions; pack rows of another length"
        )

    def join(self, results: Sequence[Any]) -> object:
        """Joins what each sequence gave along its tokens, as (B, T, ...).

        Attention weights and states, beside a result, become None: nobody asked for those of a packed row. Keys that
        were chosen, which a later layer may use again, are handed on as they are.

        Raises PadfreeError for a result, or a number, that is neither for each token nor the same for all.
        """
        first = results[0]
        if isinstance(first, Tensor):
            if (whole := self._joined(results)) is None:
                raise self._not_for_tokens(first)
            # An embedding of positions may make them for a row, as all rows have the same when they are not packed.
            of_one_row = self._rows > 1 and whole.dim() == 2 and whole.shape[0] == self._total
            return whole.unflatten(0, (self._rows, -1)) if of_one_row else whole
        if isinstance(first, dict):
            return type(first)({name: self._beside([each[name] for each in results]) for name in first})
        if isinstance(first, (tuple, list)):
            return type(first)(self._beside(each) for each in zip(*results))
        return first

    def _beside(self, results: Sequence[Any]) -> object:
        if isinstance(results[0], Tensor) and results[0].dim() > 1:
            weights = all(each.dim() == 4 and each.shape[2:] == (n, n) for each, n in zip(results, self._lengths))
            whole = None if weights else self._joined(results)
            chosen = whole is None and results[0].dtype in (torch.int32, torch.int64)
            return OfEach(results) if chosen else whole
        return self.join(results)

    def _joined(self, results: Sequence[Tensor]) -> Tensor | None:
        first = results[0]
        if all(each is first for each in results):
            return first
        dims = range(0 if first.dim() == 2 else 1, first.dim())
        fitting = [d for d in dims if all(each.shape[d] == n for each, n in zip(results, self._whole))]
        if not fitting:
            return None
        dim = 1 if first.dim() == 2 and first.shape[0] == 1 and 1 in fitting else fitting[0]
        others = [[n for d, n in enumerate(each.shape) if d != dim] for each in results]
        if any(each != others[0] for each in others):
            return None
        whole = torch.cat(self.without_prompts(results, dim), dim=dim)
        if self._rows == 1 or dim == 0:
            return whole
        return whole.squeeze(0).unflatten(dim - 1, (self._rows, -1)).movedim(dim - 1, 0)

    def _not_for_tokens(self, value: Tensor) -> PadfreeError:
        return PadfreeError(
            f"{self._who}, run on each sequence, gives a tensor of shape {tuple(value.shape)}, which has no dimension "
            f"for the {self._lengths[0]} tokens of the first and is not the same for all"
        )


def _sizes_of(module: nn.Module) -> set[object]:
    """Returns the sizes in a module that are no numbers of tokens: of its parameters, and whatever its config says."""
    said = [value for value in vars(module.config).values() if type(value) is int] if hasattr(module, "config") else []
    own = [value for value in vars(module).values() if type(value) is int]
    return {size for each in module.parameters() for size in each.shape}.union(said, own)


def _inside(value: object, change: Callable[[object], object]) -> object:
    """Returns a container with each of its values changed; None for what is no plain container."""
    if isinstance(value, dict):
        return {name: change(each) for name, each in value.items()}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(map(change, value))
    return None
