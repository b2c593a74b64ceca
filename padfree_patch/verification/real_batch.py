"""verify on a packed batch of the caller's: its lengths show what short examples can't, such as windows."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..batch.lengths import LENGTH_ARGUMENTS
from ..batch.packed_batch import read_batch
from ..batch.sequences import PackedSequences
from ..batch.shared_row import SharedRow
from ..data.unpacking import unpack
from ..errors import PadfreeError
from ..wrapping.opt_in import OptIn
from .dtypes import Dtypes
from .probe import Probe, largest


def error_on_batch(model: nn.Module, batch: Mapping[str, object], probe: Probe) -> tuple[float, float, int]:
    """Measures the largest difference between a packed batch and each of its examples alone, over the largest logit.

    Returns it, what it may be, and how many examples there are.

    Raises PadfreeError if the batch is not packed.
    """
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        given = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise PadfreeError(f"a batch to verify must have input_ids (B, T), found {given}")
    sequences = _sequences_of(tokens, batch)
    boundaries = _boundaries(model, batch)
    with probe.without_gradients():
        packed = probe.logits(tokens, **boundaries).detach().flatten(0, 1)
    error = size = 0.0
    computed = Dtypes()
    plain = tokens.plain() if isinstance(tokens, SharedRow) else tokens
    examples, results = (unpack(each, sequences, with_prompts=True) for each in (plain.flatten(), packed))
    for ids, found in zip(examples, results):
        shortest = len(ids) == min(map(len, examples))
        with computed, nullcontext() if shortest else probe.without_gradients():  # dtypes show by gradients
            alone = probe.alone(ids[None])[0].detach()
        finest = torch.promote_types(alone.dtype, torch.float32)
        error = max(error, largest(found.to(finest) - alone.to(finest)))
        size = max(size, largest(alone))
    return error / max(size, torch.finfo(torch.float32).tiny), probe.tolerance(computed, packed), len(examples)


def _sequences_of(tokens: Tensor, batch: Mapping[str, object]) -> PackedSequences:
    positions = batch.get("position_ids")
    read = read_batch(
        (tokens.shape[0], tokens.shape[1]),
        tokens.device,
        position_ids=positions if isinstance(positions, Tensor) else None,
        attention_mask=batch.get("attention_mask"),
        lengths={name: batch[name] for name in LENGTH_ARGUMENTS if batch.get(name) is not None},
    )
    if read is None or len(read.sequences) <= tokens.shape[0]:
        raise PadfreeError(
            f"the batch to verify has no second example in a row; found {sorted(batch)} of shape "
            f"{tuple(tokens.shape)}. Pass a packed batch, as a collator of padfree_patch makes it"
        )
    return read.sequences


def _boundaries(model: nn.Module, batch: Mapping[str, object]) -> dict[str, object]:
    """Returns what says where examples end: of lengths, only a patched model knows them all."""
    names = ("position_ids", "attention_mask", *(LENGTH_ARGUMENTS if OptIn.all_in(model) else ()))
    return {name: batch[name] for name in names if batch.get(name) is not None}
