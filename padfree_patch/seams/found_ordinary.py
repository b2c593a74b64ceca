"""What the head of a model has found to be ordinary, the decoder inside it need not read again.

That would cost a second device sync. It holds while the head's forward runs in this thread, for the very tensors that
the head was given, unless something was written to them since.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from ..wrapping.call import Call

_Seen = tuple[tuple[object, int], ...]
"""The tensors that say where examples end, with their version counters."""


class _UnderWay(threading.local):
    seen: _Seen | None = None


_under_way = _UnderWay()


@contextmanager
def found_ordinary(call: Call) -> Iterator[None]:
    """Remembers, while upstream's code runs, that a call was read, and is ordinary."""
    outer, _under_way.seen = _under_way.seen, _seen(call)
    try:
        yield
    finally:
        _under_way.seen = outer


def is_found_ordinary(call: Call) -> bool:
    """Whether a call is given the tensors of an outer one that was found to be ordinary."""
    known, found = _under_way.seen, _seen(call)
    if known is None or found is None:
        return False
    return all(a is b and version == other for (a, version), (b, other) in zip(known, found))


def _seen(call: Call) -> _Seen | None:
    """Returns None where a change could not be noticed, or no name says what the tokens are: nothing was read."""
    if not any(name in call.arguments for name in ("input_ids", "inputs_embeds")):
        return None
    given = [call.arguments.get(name) for name in ("position_ids", "attention_mask")]
    if any(isinstance(each, Tensor) and each.is_inference() for each in given):
        return None  # it has no version counter
    return tuple((each, each._version if isinstance(each, Tensor) else 0) for each in given)
