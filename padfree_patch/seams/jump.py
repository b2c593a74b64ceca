"""Says once for each model that its positions jump ahead, which can be read in two ways."""

from __future__ import annotations

import warnings
import weakref

from torch import nn

from ..batch.packed_batch import PackedBatch

_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def say_jump(model: nn.Module, batch: PackedBatch) -> None:
    """Warns, once for a model, of a batch in which a position jumps ahead and nothing says whether an example ends."""
    jump = batch.jump
    if jump is None or model in _told:
        return
    _told.update(model.modules())  # the decoder in it is given the same batch
    warnings.warn(
        f"{type(model).__name__}: in row {jump.row} the position jumps ahead from {jump.before} (token {jump.token}) "
        f"to {jump.after} (token {jump.token + 1}), and nothing else says whether an example ends there. It is read as "
        f"an end: {batch.sequences}. If the text goes on there, give the lengths of the examples too "
        "(packed_sequences=padfree_patch.PackedSequences.from_lengths(...), or cu_seq_lens_q), or their segment "
        "numbers as attention_mask: these win over the positions. Said once for this model",
        stacklevel=2,
    )
