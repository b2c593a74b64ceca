"""The check that a patched model gives examples that share prompts what each gets alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..batch.labels import IGNORED_LABEL
from ..data.flattening import DataCollatorWithFlattening
from ..data.unpacking import unpack
from ..patching import applied
from .models import examples
from .oracle import Make, add_gradients, as_batch, assert_gradients_close, assert_logits_close, gradients_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUPS = ((9, (3, 5)), (1, (4,)), (6, (1, 2, 7)))
"""Tokens of each prompt, and of the completions of it. A prompt of one token leaves nothing to share."""


def completions(groups: Sequence[tuple[int, Sequence[int]]] = GROUPS, *, seed: int = 5) -> list[dict[str, list[int]]]:
    """Makes random examples, several on each prompt, of which the completions have labels."""
    found = []
    for number, (prompt, lengths) in enumerate(groups):
        first, *rest = (each[0].tolist() for each in examples((prompt, *lengths), seed=seed + number))
        for answer in rest:
            found.append({"input_ids": first + answer, "labels": [IGNORED_LABEL] * len(first) + answer})
    return found


def check_shared_prompts(
    make: Make,
    *,
    rows: Sequence[dict[str, list[int]]] | None = None,
    prepare: Callable[[PreTrainedModel], object] | None = None,
) -> None:
    """Checks that loss, logits and gradients of a row with shared prompts are those of the whole examples alone.

    Args:
        make: makes the model.
        rows: the examples; those of `completions` if not given.
        prepare: called on the model, in train mode, before it runs; `checkpointing(reentrant=True)`, for example.
    """
    rows = completions() if rows is None else rows
    batch = DataCollatorWithFlattening(share_prefixes=True)(rows)
    sequences = batch["packed_sequences"]
    assert sequences.prefixes is not None and sequences.total < sum(len(row["input_ids"]) for row in rows)
    loss, logits, gradients = _alone(make, rows)
    with applied(make().train()) as model:
        if prepare is not None:
            prepare(model)
        output = model(**batch)
        output.loss.backward()
        torch.testing.assert_close(output.loss.item(), loss, rtol=2e-5, atol=0)
        for found, expected in zip(unpack(output.logits, sequences, with_prompts=True), logits):
            assert_logits_close(found, expected)
        assert_gradients_close(model, gradients)


def _alone(make: Make, rows: Sequence[dict[str, list[int]]]) -> tuple[float, list[Tensor], dict[str, Tensor]]:
    """Returns the mean loss over all labels, the logits of each example and the gradients, each from a new model."""
    predicted = sum(label != IGNORED_LABEL for row in rows for label in row["labels"][1:])
    loss, logits = 0.0, []
    gradients: dict[str, Tensor] = {}
    for row in rows:
        model: nn.Module = make().train()
        found = model(**as_batch(torch.tensor([row["input_ids"]]))).logits[0]
        mine = F.cross_entropy(found[:-1].float(), torch.tensor(row["labels"][1:]), reduction="sum") / predicted
        mine.backward()
        loss += mine.item()
        logits.append(found.detach())
        add_gradients(gradients, gradients_of(model))
    return loss, logits, gradients
