"""Calls inside torch.func's transforms, torch.jit.trace and torch.export: their tensors hide or have no values.

Ordinary calls go on as unpatched. So the values below the transforms are read, and a packed batch is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import PadfreeError

is_exporting = getattr(torch.compiler, "is_exporting", bool)  # torch 2.7 on
"""Whether torch.export traces. Nothing of it is ours: what it makes has no class that we could have patched."""

is_jit_tracing = torch.jit.is_tracing  # type: ignore[attr-defined]
"""Whether torch.jit.trace runs, for which looking at a shape or a value is a warning."""

_TracerWarning: type[Warning] = torch.jit.TracerWarning  # type: ignore[attr-defined]
_functorch = torch._C._functorch


def is_transforming() -> bool:
    """Whether a transform of torch.func is under way, or torch.jit.trace, so that nothing may depend on values."""
    return bool(_functorch.peek_interpreter_stack()) or bool(is_jit_tracing())


class Readable(NamedTuple):
    """What says where examples end, below the transforms that are under way."""

    shape: tuple[int, int]
    """(B, T) of the tokens; under vmap B counts the rows of all its calls."""
    position_ids: Tensor | None
    attention_mask: object


def readable(tokens: Tensor, position_ids: Tensor | None, attention_mask: object) -> Readable:
    """Returns what a call was given, as plain tensors."""
    shape = int(tokens.shape[0]), int(tokens.shape[1])
    given = position_ids, attention_mask
    if not any(isinstance(each, Tensor) and _is_transformed(each) for each in given):
        return Readable(shape, position_ids, attention_mask)
    with torch._C._DisableFuncTorch():
        plain = [_plain_rows(each) if isinstance(each, Tensor) and each.dim() == 2 else None for each in given]
        rows = max((each.shape[0] for each in plain if each is not None), default=shape[0])
        positions, mask = (None if each is None else each.repeat(rows // each.shape[0], 1) for each in plain)
    return Readable((rows, shape[1]), positions, mask)  # a wider mask is left out: what is packed is refused anyway


@contextmanager
def reading() -> Iterator[None]:
    """Runs the reading of a batch, of which transforms and tracers see nothing."""
    if not is_transforming():
        yield
        return
    with torch._C._DisableFuncTorch(), warnings.catch_warnings():
        warnings.simplefilter("ignore", _TracerWarning)  # the trace has nothing of what is read
        yield


def check_not_traced(name: str) -> None:
    """Raises PadfreeError if a packed batch of a model of that class is traced."""
    how = "a transform of torch.func" if _functorch.peek_interpreter_stack() else None
    how = "torch.jit.trace" if is_jit_tracing() else how
    if how:
        raise PadfreeError(
            f"{name}: a packed batch inside {how}, which padfree_patch does not support: the boundaries of this batch "
            "would be lost or stay in the trace. Pass padded batches or one example at a time there"
        )


def _is_transformed(tensor: Tensor) -> bool:
    return bool(_functorch.is_batchedtensor(tensor) or _functorch.is_gradtrackingtensor(tensor))


def _plain_rows(tensor: Tensor) -> Tensor:
    """Returns the values of a (B, T) tensor below the transforms, (N * B, T) if vmap runs over N of them."""
    dims = []
    while _is_transformed(tensor):
        if _functorch.is_batchedtensor(tensor):
            dims.append(_functorch.maybe_get_bdim(tensor))
        tensor = _functorch.get_unwrapped(tensor)
    for place, dim in enumerate(reversed(dims)):  # the innermost tensor has the dimensions of all
        tensor = tensor.movedim(dim + place, place)
    return tensor.reshape(-1, tensor.shape[-1])
