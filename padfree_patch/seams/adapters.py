"""The forward of PEFT's models, which works per row before a patched model in it sees anything.

A packed row with an adapter that can't serve it is refused there. Adapters that came after apply are checked at their
first packed call, outside everything that PEFT does for a call. No loss crosses a boundary,
also where an adapter takes the labels past the patched head.
"""

from __future__ import annotations

import torch
from torch import nn

from ..adapters import takes_labels_past_the_head
from ..models import pretrained_modules
from ..registry import Patch
from ..upstream import Arguments
from ..wrapping.call import Call
from ..wrapping.opt_in import OptIn
from ..wrapping.seam import Seam
from .head import ignore_boundaries
from .kinds import Found
from .language_head import predicts_next_tokens
from .model_call import batch_of_call, check_what_is_new, has_something_new
from .model_call import concerns as may_be_packed

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
    _prepare(call)
    return call.proceed()


@torch.compiler.disable
def _prepare(call: Call) -> None:
    module = call.module
    takes_labels = takes_labels_past_the_head(module)
    if not (takes_labels or has_something_new(module)):
        return
    batch = batch_of_call(call)
    if batch is None:
        return
    check_what_is_new(module)
    if takes_labels and predicts_next_tokens(pretrained_modules(module)[0]):
        ignore_boundaries(call.arguments, batch)
