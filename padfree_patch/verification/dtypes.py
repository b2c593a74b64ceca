"""In which dtypes a model computes: the coarsest of them says how exact its result can be."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..upstream import Arguments, Function


class Dtypes(TorchFunctionMode):
    """Collects the dtypes of all that is computed from what requires a gradient, while it is entered.

    The dtype of parameters and logits does not say it: the softmax of upstream's eager attention is float32 in a
    float64 model too, old versions cast the logits up, and a prepared model may enter autocast itself. What needs no
    gradient, such as rotary tables and ALiBi, is the same for packed examples and for one alone, however coarse it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_function__(
        self, func: Function, types: object, args: tuple[object, ...] = (), kwargs: Arguments | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.requires_grad:
            self.seen.add(result.dtype)
        return result


def autocast_around(model: nn.Module) -> AbstractContextManager[object] | None:
    """Returns the autocast that is on now for the device of a model; None if it is off."""
    device_type = next(model.parameters()).device.type
    try:
        on, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    except (AttributeError, TypeError):  # before torch 2.4
        on, dtype = device_type == "cuda" and torch.is_autocast_enabled(), torch.get_autocast_gpu_dtype()
    return torch.autocast(device_type, dtype) if on else None
