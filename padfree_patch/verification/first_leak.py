"""Finds the first module that carries something from example A to example B, or serves B otherwise than alone."""

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


@torch.no_grad()
def first_difference(
    model: nn.Module, packed: Callable[[], object], alone: Callable[[], object], lengths: tuple[int, int]
) -> str | None:
    """Names the innermost module that gives B something else in a packed row of A and B than alone, for the same input.

    None if no module's output tells the two runs apart. Lengths are those of A and B.
    """
    calls_alone: dict[str, list[_Seen]] = {}
    for seen in _calls(model, alone, lengths[1], slice(0, lengths[1])):
        calls_alone.setdefault(seen.name, []).append(seen)
    for seen in _calls(model, packed, sum(lengths), slice(lengths[0], sum(lengths))):
        if not calls_alone.get(seen.name):
            continue
        other = calls_alone[seen.name].pop(0)
        if _close(seen.inputs, other.inputs) and not _close(seen.outputs, other.outputs):
            return seen.name
    return None


def _calls(model: nn.Module, run: Callable[[], object], tokens: int, part: slice) -> list[_Seen]:
    """Runs something, and gives what every module below the model got and gave at a part of the tokens."""
    seen: list[_Seen] = []

    def hook_for(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: object, kwargs: dict[str, object], output: object) -> None:
            kwargs = {n: value for n, value in kwargs.items() if "mask" not in n and "position_ids" not in n}
            seen.append(_Seen(name, _parts((args, kwargs), tokens, part), _parts(output, tokens, part)))

        return record

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                stack.callback(module.register_forward_hook(hook_for(name), with_kwargs=True).remove)
        run()
    return seen


def _parts(value: object, tokens: int, part: slice) -> list[Tensor]:
    """Copies a part of the tokens of every tensor of numbers that has a dimension for them, in nested containers."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _parts(item, tokens, part)]
    if not isinstance(value, Tensor) or value.dim() > 4 or value.dtype == torch.bool:
        return []
    dims = [dim for dim in range(value.dim()) if value.shape[dim] == tokens]
    return [value.narrow(dims[0], part.start, part.stop - part.start).detach().clone()] if dims else []


def _close(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether two runs gave the same but for rounding, which is far below what a wrong mask or position does."""
    return len(some) == len(others) and all(
        a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-4 * max(1e-3, _largest(b)))
        for a, b in zip(some, others)
    )


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
