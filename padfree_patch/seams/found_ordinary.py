"""What the head of a model has found to be ordinary, the decoder inside it need not read again.

That would cost a second device sync. It holds while the head's forward runs in this thread, for the very tensors that
the head was given, unless something was written to them since.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from ..upstream import Arguments
from ..wrapping.call import Call

_SAY_WHERE_EXAMPLES_END = ("position_ids", "attention_mask")

_Seen = tuple[tuple[object, int], ...]
"""The tensors that say where examples end, with their version counters."""


class _HandedOn(NamedTuple):
    decoder: nn.Module
    position_ids: object
    attention_mask: object


class _UnderWay(threading.local):
    def __init__(self) -> None:  # no defaults of the class: of them torch.compile makes no guards
        self.seen: _Seen | None = None
        self.handed_on: _HandedOn | None = None


_under_way = _UnderWay()


@contextmanager
def found_ordinary(call: Call, decoder: nn.Module | None = None) -> Iterator[None]:
    """Remembers, while upstream's code runs, that a call was read, and is ordinary.

    Args:
        call: that was read.
        decoder: that torch.compile may trace as a part of the call, where it can read nothing.
    """
    outer = _under_way.seen, _under_way.handed_on
    _under_way.seen = _seen(call)
    if decoder is not None and _under_way.seen is not None:
        _under_way.handed_on = _HandedOn(decoder, *(call.arguments.get(name) for name in _SAY_WHERE_EXAMPLES_END))
    try:
        yield
    finally:
        _under_way.seen, _under_way.handed_on = outer


def is_handed_on(decoder: nn.Module, kwargs: Arguments) -> bool:
    """Whether a call of a decoder is given the tensors of an outer one that was found to be ordinary.

    Asked while torch.compile traces.
    """
    known = _under_way.handed_on
    if known is None or known.decoder is not decoder:
        return False
    same_mask = kwargs.get("attention_mask") is known.attention_mask
    return same_mask and kwargs.get("position_ids") is known.position_ids


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
    given = [call.arguments.get(name) for name in _SAY_WHERE_EXAMPLES_END]
    if any(isinstance(each, Tensor) and each.is_inference() for each in given):
        return None  # it has no version counter
    return tuple((each, each._version if isinstance(each, Tensor) else 0) for each in given)
