"""The check of models that compute the logits of labelled tokens only, `apply(model, logits=...)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..batch.labels import IGNORED_LABEL
from ..patching import applied
from ..seams.labelled import CHUNK, computing
from .models import examples, pack
from .oracle import Make, alone_loss_and_gradients, assert_gradients_close

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import ModelOutput

LENGTHS = (5, 9, 1, 12)


def completions(sequences: Sequence[Tensor]) -> list[Tensor]:
    """Returns labels (1, length) of examples whose first 60% are a prompt."""
    labels = [each.clone() for each in sequences]
    for each in labels:
        each[:, : each.shape[1] * 3 // 5] = IGNORED_LABEL
    return labels


def check_labelled_logits(
    make: Make,
    *,
    logits: str = "labelled",
    chunk: int = CHUNK,
    prepare: Callable[[PreTrainedModel], object] | None = None,
) -> ModelOutput:
    """Checks that loss and gradients are those of each example alone, averaged over the labels. Returns the output.

    Args:
        make: makes the model.
        logits: what to apply with.
        chunk: rows of a chunk, for "chunked".
        prepare: called on the patched model, in train mode, before it runs.
    """
    sequences = examples(LENGTHS)
    labels = completions(sequences)
    loss, gradients = alone_loss_and_gradients(make, sequences, labels)
    with applied(make().train(), logits=logits) as model:
        if prepare is not None:
            prepare(model)
        with computing(logits, chunk):
            output = model(**pack(sequences), labels=torch.cat(labels, dim=1))
        output.loss.backward()
        torch.testing.assert_close(output.loss.item(), loss, rtol=2e-6, atol=0)  # float32 means, summed in two ways
        assert_gradients_close(model, gradients)
    return output
