"""Brings tensors of the caller's to the host, whatever their dtype, and checks that they hold whole numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import PadfreeError

Values = npt.NDArray[Any]
"""int64, or float64 where the tensor held floating-point numbers."""


def host_values(tensor: Tensor) -> Values:
    """Returns the values of a tensor of any dtype. Only here does the library read a caller's tensor: its one sync."""
    return widened(tensor.detach().cpu()).numpy()


def exceeds(tensor: Tensor, limit: int) -> bool:
    """Whether any value of a tensor of any dtype is larger than the limit. One device sync."""
    return bool((widened(tensor) > limit).any())


def host_together(*tensors: Tensor) -> list[Values]:
    """Returns the values of tensors of one shape, which come to the host together. One device sync."""
    wide = [widened(each) for each in tensors]
    dtype = functools.reduce(torch.promote_types, (each.dtype for each in wide))
    return list(host_values(torch.stack([each.to(dtype) for each in wide])))


def values_on_cpu(tensor: Tensor) -> Values | None:
    """Returns the values of a tensor if it lies on the CPU, where reading is free; None if not."""
    return widened(tensor.detach()).numpy() if tensor.device.type == "cpu" else None


def check_whole(values: Values, dtype: torch.dtype, name: str, remedy: str = "give integers") -> Values:
    """Returns int64 values (T,) or (B, T), which came from a tensor of that dtype.

    Raises PadfreeError, with the remedy, if one is not whole, or too large for the dtype to tell it from the next.
    """
    if not dtype.is_floating_point:
        return values.astype(np.int64)
    limit = 2 / torch.finfo(dtype).eps  # of bfloat16 256: 257 is rounded to it
    wrong = ~(values == np.floor(values)) | ~(np.abs(values) < limit)
    if wrong.any():
        place = np.argwhere(wrong)[0]
        found = values[tuple(place)]
        kind = str(dtype).removeprefix("torch.")
        why = f"which {kind} can't tell from the next number" if abs(found) >= limit else "which is not a whole number"
        at = f"row {place[0]}, token {place[1]}" if len(place) == 2 else f"token {place[-1]}"
        raise PadfreeError(f"{name}: {found:g} ({at}), {why}; {remedy}")
    return values.astype(np.int64)


def is_whole(values: Values) -> bool:
    """Whether all values are finite whole numbers."""
    return values.dtype.kind != "f" or bool(np.isfinite(values).all() and (values == np.floor(values)).all())


def check_on_device(good: Tensor, message: str, details: Callable[[], str] = str) -> None:
    """Raises PadfreeError with the message unless `good`, a bool tensor of one element, is true.

    A device checks it without a sync, and on CUDA the error is the device's own; on the CPU it is checked here.

    Args:
        good: what must be true.
        message: what is wrong if it is not.
        details: called only then; its result follows the message.
    """
    try:
        torch._assert_async(good, message)
    except RuntimeError as error:
        if not good:  # or the device can't assert
            raise PadfreeError(" ".join(filter(None, (message, details())))) from error


def widened(tensor: Tensor) -> Tensor:
    """Returns int64 or float64: numpy knows no bfloat16, and small integers would wrap when something is added."""
    if tensor.is_complex():
        raise PadfreeError(f"{str(tensor.dtype).removeprefix('torch.')} where positions or segment numbers should be")
    if not tensor.is_floating_point():
        return tensor.long()
    return tensor.float() if tensor.device.type == "mps" else tensor.double()  # Apple's has no float64
