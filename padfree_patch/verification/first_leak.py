"""Finds the first module that carries something from example A to example B."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn


class _Seen(NamedTuple):
    """What one call of a module got and gave at B's tokens."""

    name: str
    inputs: list[Tensor]
    outputs: list[Tensor]


def first_leak(
    model: nn.Module, run: Callable[[Tensor], object], some_a: Tensor, other_a: Tensor, tokens_of_b: int
) -> str | None:
    """Names the innermost module whose output at B differs between two As although its input at B is the same.

    `run` makes a packed forward of an A (1, tokens, D) and B. None if no module's output tells the two runs apart.
    """
    one, other = (_record(model, run, a, tokens_of_b) for a in (some_a, other_a))
    for seen, again in zip(one, other):
        if _same(seen.inputs, again.inputs) and not _same(seen.outputs, again.outputs):
            return seen.name
    return None


def _record(model: nn.Module, run: Callable[[Tensor], object], a: Tensor, tokens_of_b: int) -> list[_Seen]:
    """Runs A and B, and gives what every module below the model got and gave, in the order in which they returned."""
    seen: list[_Seen] = []
    at_b = functools.partial(_tensors_at_b, tokens=a.shape[1] + tokens_of_b, first=a.shape[1])

    def hook_for(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: object, kwargs: object, output: object) -> None:
            seen.append(_Seen(name, at_b((args, kwargs)), at_b(output)))

        return record

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                stack.callback(module.register_forward_hook(hook_for(name), with_kwargs=True).remove)
        run(a)
    return seen


def _tensors_at_b(value: object, *, tokens: int, first: int) -> list[Tensor]:
    """Copies the part from token `first` on of every floating-point tensor (1, tokens, ...) in nested containers."""
    if isinstance(value, Tensor):
        fits = value.is_floating_point() and value.dim() == 3 and value.shape[1] == tokens
        return [value[:, first:].detach().clone()] if fits else []
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors_at_b(item, tokens=tokens, first=first)]
    return []


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others))
