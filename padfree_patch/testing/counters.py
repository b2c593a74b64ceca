"""Counters that need no GPU: device syncs that a CUDA run would have, and the largest tensor that came up."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..upstream import Arguments, Function

if TYPE_CHECKING:
    from torch._ops import OpOverload

_READING_OPERATORS = (
    "_local_scalar_dense",  # .item(), bool(), int(), tensor indices of a slice
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
)


class SyncCounter:
    """Counts what would wait for the device if the tensors were on one, while it is entered.

    Operators that hand values to Python, or whose output size depends on values, are counted in the dispatcher;
    `.cpu()`, `.to("cpu")` and `.tolist()`, which it does not see on CPU tensors, by a torch-function mode beside it.

    >>> with SyncCounter() as syncs:
    ...     _ = torch.arange(3).max().item()
    >>> syncs.total, dict(syncs.by_name)
    (1, {'_local_scalar_dense': 1})
    """

    def __init__(self) -> None:
        self.by_name: Counter[str] = Counter()
        self._modes = (_Functions(self.by_name), _Operators(self.by_name))

    @property
    def total(self) -> int:
        return sum(self.by_name.values())

    def __enter__(self) -> SyncCounter:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exception)


class _Operators(TorchDispatchMode):
    def __init__(self, by_name: Counter[str]):
        super().__init__()
        self._by_name = by_name

    def __torch_dispatch__(
        self, func: OpOverload[..., object], types: object, args: tuple[Any, ...] = (), kwargs: Arguments | None = None
    ) -> object:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None and "Tensor" in func._overloadname
        if name in _READING_OPERATORS or by_mask or unsized:
            self._by_name[name] += 1
        return func(*args, **kwargs)


class _Functions(TorchFunctionMode):
    def __init__(self, by_name: Counter[str]):
        super().__init__()
        self._by_name = by_name

    def __torch_function__(
        self, func: Function, types: object, args: tuple[object, ...] = (), kwargs: Arguments | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in (Tensor.cpu, Tensor.tolist):
            self._by_name[func.__name__] += 1
        elif func is Tensor.to and "cpu" in (
            value for value in (*args[1:], *kwargs.values()) if isinstance(value, str)
        ):
            self._by_name["to_cpu"] += 1
        return func(*args, **kwargs)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operator returned while it is entered. Of a view, what it is a view of.

    >>> with LargestTensor() as largest:
    ...     _ = torch.ones(3, 4) @ torch.ones(4, 5)
    >>> largest.elements, largest.shape
    (20, (4, 5))
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.shape: tuple[int, ...] = ()
        self.operator = ""

    def __torch_dispatch__(
        self, func: Function, types: object, args: tuple[object, ...] = (), kwargs: Arguments | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and (elements := _elements(value)) > self.elements:
                self.elements, self.shape, self.operator = elements, tuple(value.shape), str(func)
        return result


def _elements(tensor: Tensor) -> int:
    """Returns how many numbers of a tensor lie in memory; an expanded one has most of them in no place of its own."""
    return math.prod(n for n, stride in zip(tensor.shape, tensor.stride()) if stride) if tensor.numel() else 0
