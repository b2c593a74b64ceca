"""A stand-in for the mask that notes what decoders do to it, so that it can be done to the mask of each sequence.

Like `padfree_patch.seams.stand_in`, an int32 tensor whose values are `PackedBatch.boundaries`; here with six
dimensions, (B, T, number + 1, boundaries, 1, T). Some decoders compare the first, second and last with the tokens; the
third numbers a recipe. What a decoder does to a mask on its way to the layers (casts, `1 - mask`, slices to the number
of keys) makes another recipe; the values stay what they are.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor

from ..batch.packed_batch import PackedBatch, batch_at_layer
from ..upstream import Arguments, Function


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """What a sequence of a given length is handed as its mask when it is run alone."""

    build: Callable[[int, torch.device], object]
    """Makes the mask of so many tokens; None where upstream makes none."""
    kind: str = "other"
    """What the mask shows: "causal", "window", "chunk", or "other"."""
    size: int = 0
    """Newest tokens that a query sees in a window, itself included; tokens of a chunk."""


def _ones(length: int, device: torch.device) -> Tensor:
    return torch.ones(1, length, dtype=torch.long, device=device)


CALLERS_OWN = Recipe(_ones, "causal")
"""What nobody has turned into another mask yet: that of a caller who pads nothing."""


class _Recipes:
    """All recipes by number; the same builder, called in the same way, has one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        self._recipes = [CALLERS_OWN]
        self._numbers: dict[Hashable, tuple[int, ...]] = {}

    def numbers(self, key: Hashable, make: Callable[[], Iterable[Recipe]]) -> tuple[int, ...]:
        """Returns the numbers of the recipes that `make` makes, the first time that the key comes."""
        with self._lock:
            known = self._numbers.get(key)
        if known is None:
            made = list(make())  # which may call upstream
            with self._lock:
                first = len(self._recipes)
                self._recipes += made
                known = self._numbers[key] = tuple(range(first, first + len(made)))
        return known

    def __getitem__(self, number: int) -> Recipe:
        return self._recipes[number]

    def __len__(self) -> int:
        return len(self._recipes)


recipes = _Recipes()


class NotedMask(Tensor):
    """Stays a stand-in through what decoders do to a mask."""

    @classmethod
    def __torch_function__(
        cls, func: Function, types: object, args: tuple[object, ...] = (), kwargs: Arguments | None = None
    ) -> object:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "detach":
            return args[0]
        if name == "__contains__":  # `0 in mask`: a mask without a zero is dropped (flash-attention, until 4.52)
            return True
        if name == "all":  # `(mask == 1).all()`: a mask of ones alone is dropped
            return torch.tensor(False)
        if name in _NOTED and not any(_is_large(each) for each in (*args, *kwargs.values())):
            return _noted(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


_CASTS = ("to", "bool", "float", "type", "type_as", "int", "long", "half", "bfloat16", "clone", "contiguous")
_ARITHMETIC = ("rsub", "sub", "mul", "add", "__rsub__", "__sub__", "__mul__", "__rmul__", "__add__", "__radd__")
_LOGIC = ("__invert__", "bitwise_not", "logical_not", "masked_fill")
_COMPARISONS = ("eq", "ne", "lt", "gt", "__eq__", "__ne__", "__lt__", "__gt__")
_VIEWS = ("__getitem__", "unsqueeze", "view", "reshape", "expand")
_NOTED = frozenset((*_CASTS, *_ARITHMETIC, *_LOGIC, *_COMPARISONS, *_VIEWS))
"""Functions that make of a mask another one for the same tokens."""


def _is_large(value: object) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, NotedMask) and value.dim() > 0


_SHAPES = ("view", "reshape", "expand")
_TOKENS = "tokens"
"""Stands for a size that is the number of tokens of whatever sequence a mask is made for."""


def _of_any_size(name: str, args: tuple[object, ...], mask: Tensor) -> tuple[object, ...]:
    """Returns the arguments of a call as for one sequence: a shape is that of all rows, `view(batch_size, -1)`."""
    if name not in _SHAPES:
        return args
    (rows, tokens), sizes = mask.shape[:2], args[1] if isinstance(args[1], (tuple, list)) else args[1:]
    first, *others = sizes
    return args[0], (1 if first == rows else first, *(_TOKENS if each == tokens else each for each in others))


def _sized(value: object, length: int) -> object:
    return tuple(length if each is _TOKENS else each for each in value) if isinstance(value, tuple) else value


def _noted(func: Function, args: tuple[object, ...], kwargs: Arguments) -> Tensor:
    mask = next(each for each in args if isinstance(each, NotedMask))
    number, args = number_of(mask), _of_any_size(func.__name__, args, mask)
    if func.__name__ == "__getitem__":
        args = (mask, _without_ends(args[1], mask.shape[1]))
    written = repr(tuple("mask" if each is mask else each for each in args)), repr(kwargs)

    def make() -> list[Recipe]:
        before = recipes[number]

        def build(length: int, device: torch.device) -> object:
            made = before.build(length, device)
            return (
                None
                if made is None
                else func(*(made if each is mask else _sized(each, length) for each in args), **kwargs)
            )

        same = func.__name__ in ("clone", "contiguous") or (func.__name__ == "__getitem__" and _takes_all(args[1]))
        return [dataclasses.replace(before, build=build) if same else Recipe(build)]

    (noted,) = recipes.numbers(("noted", func, number, *written), make)
    return with_recipe(mask, noted)


def _without_ends(index: object, tokens: int) -> object:
    """Returns an index with slices to the number of keys, which are all tokens of the row, as slices of everything."""
    if isinstance(index, tuple):
        return tuple(_without_ends(each, tokens) for each in index)
    return slice(None) if index in (slice(None, tokens), slice(0, tokens)) else index


def _takes_all(index: object) -> bool:
    """Whether an index takes every token, and adds no dimension: the last tokens of many would be a window."""
    each_one = index if isinstance(index, tuple) else (index,)
    return all(each is Ellipsis or each == slice(None) for each in each_one)


def noted_mask(batch: PackedBatch) -> Tensor:
    """Returns what stands for the caller's own mask, (B, T, 1, boundaries, 1, T). Allocates nothing."""
    rows, tokens = batch.position_ids.shape
    values = batch.boundaries[None, None, None, :, None, None]
    return values.expand(rows, tokens, 1, -1, 1, tokens).as_subclass(NotedMask)


def with_recipe(mask: Tensor, number: int) -> Tensor:
    """Returns the stand-in of the same batch with another recipe."""
    plain = mask.as_subclass(Tensor)
    return plain[:, :, :1].expand(-1, -1, number + 1, -1, -1, -1).as_subclass(NotedMask)


def is_noted(value: object) -> bool:
    return isinstance(value, NotedMask)


def find_noted(values: Iterable[object]) -> Tensor | None:
    """Returns the first stand-in among the arguments of a call, or in a dictionary of masks among them; or None."""
    for value in values:
        if isinstance(value, NotedMask):
            return value
        if isinstance(value, dict) and (inside := find_noted(value.values())) is not None:
            return inside
    return None


def recipe_of(mask: Tensor) -> Recipe:
    return recipes[number_of(mask)]


def number_of(mask: Tensor) -> int:
    """Returns the number of a stand-in's recipe."""
    return mask.as_subclass(Tensor).shape[2] - 1


def batch_of(mask: Tensor, device: torch.device) -> PackedBatch:
    """Returns the batch that a stand-in carries; the device is that of the layer's tokens."""
    plain = mask.as_subclass(Tensor)
    return batch_at_layer(plain[0, 0, 0, :, 0, 0], (plain.shape[0], plain.shape[1]), device)
