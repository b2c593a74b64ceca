"""The forward of PEFT's models, which works per row before a patched model in it sees anything.

A packed row with an adapter that can't serve it is refused there, and so is one whose examples are to have an adapter
each. Adapters that came after apply are checked at their first packed call, outside everything that PEFT does for a
call. No loss crosses a boundary, also where an adapter takes the labels past the patched head.
"""

from __future__ import annotations

import torch
from torch import nn

from ..adapters import check_what_rows_are_told, is_told_rows, takes_labels_past_the_head, works_by_row
from ..models import pretrained_modules
from ..registry import Patch
from ..upstream import Arguments
from ..wrapping.call import Call
from ..wrapping.frames import Outside
from ..wrapping.opt_in import OptIn
from ..wrapping.seam import Seam
from .head import ignore_boundaries
from .kinds import Found
from .language_head import predicts_next_tokens
from .model_call import batch_of_call, check_what_is_new, has_something_new
from .model_call import concerns as may_be_packed
from .under_way import keeping_rows

NAME = "adapters"

PEFT = {
    "peft.peft_model": (
        "PeftModel",
        "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
    ),
    "peft.mixed_model": ("PeftMixedModel",),
}
"""PEFT's classes that have a forward, by the module that they are in; others' subclasses call these."""


def find(model: nn.Module, patch: Patch | None = None) -> Found:
    """Returns PEFT's forwards, whether or not PEFT is imported: the model may be put into one of them later."""
    owners = [f"{module}:{name}" for module, names in PEFT.items() for name in names]
    return Found(frozenset(Seam(owner, "forward", concerns, answer, optional=True) for owner in owners))


def concerns(args: tuple[object, ...], kwargs: Arguments) -> bool:
    # OptIn.of the patched model inside: PEFT looks there for what it does not have itself
    return OptIn.of(args[0]) is not None and may_be_packed(args, kwargs)


def answer(call: Call) -> object:
    if not _prepare(call):
        return call.proceed()
    with Outside(keeping_rows):
        return call.proceed()


@torch.compiler.disable
def _prepare(call: Call) -> bool:
    """Checks a packed call, and takes the labels at boundaries out of it.

    Returns whether it is of a padded batch whose rows PEFT looks at, so that no decoder may make one row of them.
    """
    module = call.module
    takes_labels, told = takes_labels_past_the_head(module), is_told_rows(call.arguments)
    if not (takes_labels or told or has_something_new(module)):
        return works_by_row(module)
    batch = batch_of_call(call)
    if batch is None:
        return told or works_by_row(module)
    check_what_is_new(module)
    if told:
        check_what_rows_are_told(module, call.arguments, len(batch.position_ids), len(batch.sequences.lengths))
    if takes_labels and predicts_next_tokens(pretrained_modules(module)[0]):
        ignore_boundaries(call.arguments, batch)
    return False
