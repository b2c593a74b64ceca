"""How the figures of a callback reach what shows them: trackers that stand before it, and the notebook's table."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

_WriteLine = Callable[[dict[str, object]], object]
"""Adds a row to the table that a notebook shows."""


def calling_trainer(callback: TrainerCallback) -> Trainer | None:
    """Returns the Trainer that is calling a method of the callback right now; None if nobody does.

    A Trainer hands its callbacks the model, the loaders and its state, but not the list of callbacks that they are in.
    """
    from transformers import Trainer

    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and any(each is callback for each in owner.callback_handler.callbacks):
            return owner
        frame = frame.f_back
    return None


def put_first(trainer: Trainer, callback: TrainerCallback) -> None:
    """Makes the callback the first of the Trainer's, so that whoever writes its logs finds what this one adds.

    The handler may be in the middle of its list, at this callback: those after it keep their places.
    """
    callbacks = trainer.callback_handler.callbacks
    callbacks[:] = [callback, *(each for each in callbacks if each is not callback)]


def show_in_notebooks(trainer: Trainer, figures: dict[str, float | str]) -> None:
    """Lets the tables that the Trainer shows in notebooks have `figures`, a dictionary that goes on changing."""
    for each in trainer.callback_handler.callbacks:
        tracker = getattr(each, "training_tracker", None)  # of a NotebookProgressCallback, while it trains
        if tracker is not None and "write_line" not in vars(tracker):
            tracker.write_line = _adding(tracker.write_line, figures)


def _adding(write_line: _WriteLine, figures: dict[str, float | str]) -> _WriteLine:
    return lambda values: write_line({**values, **figures})
