"""What was read from a tensor is found again by the tensor's identity, so that every layer need not read it anew."""

from __future__ import annotations

import collections
import enum
import threading
from collections.abc import Hashable
from typing import Final, Generic, Literal, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class Missing(enum.Enum):
    """The type of `MISSING`: nothing is known of a key, where None may be what is known."""

    MISSING = enum.auto()


MISSING: Final = Missing.MISSING


class LastUsed(Generic[Value]):
    """The values that were used last, by key; a bounded dictionary.

    Whatever a key is the identity of is held beside the value, so that its memory can't be reused for something else
    meanwhile. Shared by all threads: the backward of a CUDA model runs in one of its own.
    """

    def __init__(self, entries: int = 32):
        self._entries = entries
        self._known: collections.OrderedDict[Hashable, tuple[Value, object]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def find(self, key: Hashable) -> Value | Literal[Missing.MISSING]:
        with self._lock:
            if key not in self._known:
                return MISSING
            self._known.move_to_end(key)
            return self._known[key][0]

    def keep(self, key: Hashable, value: Value, held: object = None) -> Value:
        with self._lock:
            self._known[key] = (value, held)
            self._known.move_to_end(key)
            while len(self._known) > self._entries:
                self._known.popitem(last=False)
        return value

    def clear(self) -> None:
        with self._lock:
            self._known.clear()


def own_key(tensor: Tensor) -> Hashable:
    """Returns the key of a tensor that only this library writes to.

    All views that share storage, version counter, shape and strides have the same key, so the detached copies that
    reentrant checkpointing hands to the layers are found again.
    """
    if tensor.is_inference():  # no version counter, so a change can't be noticed: never found again
        return object()
    return tensor.data_ptr(), tensor._version, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
