"""Says once for each model that it is trained on full rows, of which nothing says where examples end.

Some packings make such rows: TRL's packing_strategy="wrapped", older packings, texts cut into blocks. Their examples
mix, and no patch can know.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref

import torch
from torch import Tensor, nn

from ..batch.packed_batch import PackedBatch
from ..wrapping.opt_in import OptIn

FULL = 10
"""Training batches of full rows after which it is said."""

PADDED = 3
"""Padded batches that there may be before: the last row of an epoch is short."""


@dataclasses.dataclass
class _Seen:
    full: int = 0
    padded: int = 0
    settled: bool = False
    """Whether nothing more is to be said."""
    newest: weakref.ref[Tensor] | None = None
    """The newest tokens: `__call__` and forward look at the same ones, and one batch again and again is no training."""


_seen: weakref.WeakKeyDictionary[nn.Module, _Seen] = weakref.WeakKeyDictionary()
"""What each decoder was trained on."""


def look_at_bare_call(module: nn.Module, tokens: Tensor) -> None:
    """Counts a call that has neither positions nor a mask. Does nothing while torch.compile traces it."""
    if not torch.compiler.is_compiling() and (seen := _watched(module, tokens)) is not None:
        _count(seen, module)


def look_at_call(module: nn.Module, tokens: Tensor | None, mask: object, batch: PackedBatch | None) -> None:
    """Counts a call by whether its rows are full; after a packed one, nothing is said of the model any more."""
    if tokens is None or (seen := _watched(module, tokens)) is None:
        return
    if batch is not None or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)):
        seen.settled = True
    elif mask is None or _is_full(mask):
        _count(seen, module)
    else:
        seen.padded += 1
        seen.settled = seen.padded > PADDED


def settle(model: nn.Module) -> None:
    """Notes that lengths said of a model's rows that each is one example: of its full rows nothing is to be said."""
    _seen.setdefault(getattr(model, "base_model", model), _Seen()).settled = True


def _watched(module: nn.Module, tokens: Tensor) -> _Seen | None:
    """Returns what is known of a decoder that is trained on new tokens, while there is something to find out."""
    opt_in = OptIn.of(module)
    if opt_in is None or not opt_in.layers or not module.training or not torch.is_grad_enabled():
        return None
    seen = _seen.setdefault(module, _Seen())
    if seen.settled or (seen.newest is not None and seen.newest() is tokens):
        return None
    seen.newest = weakref.ref(tokens)
    return seen


def _is_full(mask: Tensor) -> bool:
    """Whether a mask has no padding. One device sync, in the first few batches."""
    try:
        return not bool((mask == 0).any())
    except RuntimeError:  # inside a transform of torch.func there are no values to read
        return False


def _count(seen: _Seen, module: nn.Module) -> None:
    seen.full += 1
    if seen.full < FULL:
        return
    seen.settled = True
    warnings.warn(
        f"{type(module).__name__}: {FULL} batches that it was trained on have full rows, of which nothing says where "
        "examples end (no positions that restart, no lengths, no segment numbers, no padding), and none was packed. If "
        "a row holds several examples, they mix: docs/training.md names the packings that carry boundaries, such as "
        "padfree_patch.pack_dataset. If it holds one, padfree_patch has nothing to do: put several into a row, or "
        "take it off with padfree_patch.restore(model). Said once for this model",
        stacklevel=2,
    )
