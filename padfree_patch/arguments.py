"""Reads the numbers that a caller gives: one that is not whole, or too small, is an error that names the argument."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .errors import PadfreeError

Integers = npt.NDArray[np.int64]

MOST = 2**53
"""The largest float or length that is taken: every whole number up to it is also a float of its own."""


def names(values: object, name: str) -> list[str]:
    """Returns a list of names.

    Raises PadfreeError naming the argument if it is none.
    """
    if isinstance(values, list | tuple | set | frozenset) and all(isinstance(each, str) for each in values):
        return list(values)
    raise PadfreeError(f"{name} must be a list of names, such as ['weight'], found {_shown(values)}")


def number_of_64_bits(value: object, name: str) -> int:
    """Returns a number, such as a label, as an int.

    Raises PadfreeError naming the argument if it is not whole, or int64 does not hold it.
    """
    found = whole_number(value, name)
    if not -(2**63) <= found < 2**63:
        raise PadfreeError(f"{name} must be a whole number of 64 bits, found {_shown(value)}")
    return found


def whole_number(value: Any, name: str, least: int | None = None) -> int:
    """Returns a number as an int.

    Raises PadfreeError naming the argument if it is not whole, a truth value, or less than `least`.

    >>> whole_number(8, "batch_size", 1)
    8
    """
    if isinstance(value, torch.Tensor) and value.numel() == 1 and value.device.type != "meta":
        value = value.item()
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if isinstance(value, float | np.floating):
        is_whole = not _is_wrong(np.asarray(value)).any()
    if not is_whole or (least is not None and value < least):
        wanted = "a whole number" if least is None else f"a whole number, {least} or more"
        raise PadfreeError(f"{name} must be {wanted}, found {_shown(value)}")
    return int(value)


def whole_numbers(values: Iterable[object], name: str) -> Integers:
    """Returns numbers as int64 (N,).

    Raises PadfreeError naming the first one that is not whole, by its place, or saying that these are no numbers.

    >>> whole_numbers([3, 5.0], "lengths").tolist()
    [3, 5]
    """
    array = _as_array(values, name)
    if array.size and array.dtype.kind not in "iuf":
        wrong = [_is_no_length(each) for each in array]
    else:
        wrong = _is_wrong(array).tolist()
    if any(wrong):
        place = wrong.index(True)
        raise PadfreeError(f"{name} must be whole numbers, found {_shown(array[place])} at place {place}")
    return array.astype(np.int64)


def has_truth_values(values: Iterable[object]) -> bool:
    """Whether a truth value is among values: numpy and torch would make 1 of it beside numbers."""
    kinds = set(map(type, values))
    return not kinds.isdisjoint((bool, np.bool_)) or (
        torch.Tensor in kinds and any(isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in values)
    )


def _as_array(values: object, name: str) -> npt.NDArray[np.generic]:
    """Returns an array (N,), of objects if the values are not all numbers."""
    if isinstance(values, torch.Tensor):
        try:
            values = values.detach().cpu()
            values = (values.double() if values.is_floating_point() else values).numpy()
        except (TypeError, RuntimeError) as error:  # sparse, or on the meta device
            raise PadfreeError(
                f"{name} must be a list of whole numbers, found a tensor without them: {error}"
            ) from error
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise PadfreeError(f"{name} must be a list of whole numbers, found {_shown(values)}")
    if not isinstance(values, np.ndarray):
        values = list(values)
        try:
            values = np.asarray(values, dtype=object if has_truth_values(values) else None)
        except (ValueError, TypeError, RuntimeError):  # lists of several lengths, tensors of several values
            values = np.fromiter(values, dtype=object)
    if values.ndim != 1:
        raise PadfreeError(f"{name} must be a list of whole numbers, found shape {values.shape}")
    return values


def _is_wrong(numbers: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
    """Returns where numbers are not whole, not finite, or too large."""
    if numbers.dtype.kind not in "iuf":
        return np.ones(numbers.shape, dtype=np.bool_)
    values = numbers.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return ~((np.abs(values) <= MOST) & (values == np.trunc(values)))


def _is_no_length(value: object) -> bool:
    try:
        return abs(whole_number(value, "")) > MOST
    except PadfreeError:
        return True


def _shown(value: object) -> str:
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= 60 else f"{text[:60]}..."
