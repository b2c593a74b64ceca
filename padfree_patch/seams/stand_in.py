"""What travels in the place of a packed row's attention mask: a tensor that carries the batch.

A packed row has no mask of T x T. What goes from the decoder to its layers instead is an int32 tensor of shape
(1, 1, window + 1, m, boundaries). Its values are `PackedBatch.boundaries`: they say where the sequences end. Its third
dimension is the recipe: how upstream's builder masks one sequence. Its fourth, m, is 1, except on the way to builders
that torch.compile traces: those can try nothing out, and find there what was measured before (`Measured`).

Being an argument, it survives gradient checkpointing, replicas and other threads. Its shape is read without a device
sync, and so are its values, which lie on the CPU wherever the lengths are known there.

Ordinary masks have at most four dimensions. Should it come to code that nobody answers for, it fits no scores: it never
has as many values as a row has keys, so adding it is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from ..batch.packed_batch import PackedBatch, batch_at_layer


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How upstream's builder masks one sequence: causally, as far as `window` reaches."""

    window: int = 0
    """Newest tokens that a query sees, itself included; 0 for all."""


CAUSAL = Recipe()


@dataclasses.dataclass(frozen=True)
class Measured:
    """The recipes of the two kinds of builders that a decoder may call."""

    plain: Recipe = CAUSAL
    sliding: Recipe = CAUSAL
    """Of the builder of layers with a sliding window, where these have one of their own (4.53 on)."""


def stand_in(batch: PackedBatch, recipe: Recipe = CAUSAL) -> Tensor:
    """Returns what stands for the mask of a packed batch, (1, 1, window + 1, 1, boundaries). Allocates nothing."""
    return with_recipe(batch.boundaries[None, None, None, None, :], recipe)


def with_recipe(mask: Tensor, recipe: Recipe) -> Tensor:
    """Returns the stand-in of the same batch with another recipe."""
    return mask[:, :, :1, :1].expand(1, 1, recipe.window + 1, 1, -1)


def with_measured(mask: Tensor, measured: Measured) -> Tensor:
    """Returns the stand-in of the same batch, in which a builder finds its recipe."""
    return mask[:, :, :1, :1].expand(1, 1, measured.plain.window + 1, measured.sliding.window + 2, -1)


def as_measured(mask: Tensor, *, sliding: bool) -> Tensor | None:
    """Returns the stand-in of the same batch with the recipe that was measured; None if none was.

    Traced by torch.compile.

    Args:
        mask: made by `with_measured`, or not.
        sliding: whether the recipe of the builder for sliding windows is wanted.
    """
    if mask.shape[3] == 1:
        return None
    window = mask.shape[3] - 2 if sliding else mask.shape[2] - 1
    return mask[:, :, :1, :1].expand(1, 1, window + 1, 1, -1)


def is_stand_in(value: object) -> bool:
    if not isinstance(value, Tensor) or value.dim() != 5 or value.dtype != torch.int32:
        return False
    return value.shape[0] == value.shape[1] == 1


def find_stand_in(values: Iterable[object]) -> Tensor | None:
    """Returns the first stand-in among the arguments of a call, or None."""
    for value in values:
        if isinstance(value, Tensor) and is_stand_in(value):
            return value
    return None


def recipe_of(mask: Tensor) -> Recipe:
    return Recipe(window=mask.shape[2] - 1)


def batch_of(
    mask: Tensor, shape: tuple[int, int], device: torch.device, position_ids: Tensor | None = None
) -> PackedBatch:
    """Returns the batch that a stand-in carries; shape (B, T) and device are those of the layer's tokens."""
    return batch_at_layer(mask[0, 0, 0, 0], shape, device, position_ids)
