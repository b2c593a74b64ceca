"""The packed call that runs in this thread, for places that upstream calls with nothing that says so.

Only what lies inside one forward of one module may ask here: at a recomputation under gradient checkpointing that
forward runs again, and sets it again.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from ..batch.packed_batch import PackedBatch

if TYPE_CHECKING:
    from .answers import Answers
    from .hand_over import Handed
    from .kernel import PackedKernel


class _UnderWay(threading.local):
    def __init__(self) -> None:  # no defaults of the class: of them torch.compile makes no guards
        self.batch: PackedBatch | None = None
        self.kernel: PackedKernel | None = None
        self.generating: frozenset[int] = frozenset()
        self.answers: Answers | None = None
        self.masks: dict[Hashable, object] | None = None
        self.handed: Handed | None = None
        self.logits: tuple[str, int] | None = None
        self.keeps_rows = False


under_way = _UnderWay()
"""Its `batch` is the one whose rotary runs; its `kernel` the one that flash-attn would be called for; `generating` has
the ids of the modules of models that generate; `answers` say who has answered in the innermost packed forward; `masks`
are those that were made in it for single sequences, which all layers share as they share upstream's; `handed` is what a
head on labelled tokens waits for from the decoder that it calls; `logits` says, while `verify` compares them, which
logits heads compute, and in chunks of how many rows; `keeps_rows` says that what is around a decoder looks at the rows
of a padded batch, which then stay rows."""


@contextmanager
def running(*, batch: PackedBatch | None = None, kernel: PackedKernel | None = None) -> Iterator[None]:
    """Sets what is given while upstream's code runs, and puts back what was there before."""
    outer = under_way.batch, under_way.kernel
    under_way.batch, under_way.kernel = batch or outer[0], kernel or outer[1]
    try:
        yield
    finally:
        under_way.batch, under_way.kernel = outer


@contextmanager
def sharing_masks() -> Iterator[None]:
    """Lets the layers of a model's forward share the masks of single sequences, until it ends."""
    outer, under_way.masks = under_way.masks, {}
    try:
        yield
    finally:
        under_way.masks = outer


@contextmanager
def keeping_rows() -> Iterator[None]:
    """Says that the rows of a padded batch must stay rows, while a model around the decoder runs that looks at them."""
    outer, under_way.keeps_rows = under_way.keeps_rows, True
    try:
        yield
    finally:
        under_way.keeps_rows = outer


@contextmanager
def generating(model: nn.Module) -> Iterator[None]:
    """Says that a model generates, while upstream's loop runs; other models that it calls don't."""
    outer = under_way.generating
    under_way.generating = outer | {id(module) for module in model.modules()}
    try:
        yield
    finally:
        under_way.generating = outer


@contextmanager
def nothing_running() -> Iterator[None]:
    """Says that no packed call is under way, while upstream's code runs on one sequence alone."""
    outer = under_way.batch, under_way.kernel
    under_way.batch = under_way.kernel = None
    try:
        yield
    finally:
        under_way.batch, under_way.kernel = outer
