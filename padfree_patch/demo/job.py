"""What a worker is told, and what it sends back on the way."""

from __future__ import annotations

import dataclasses
from typing import TypedDict


@dataclasses.dataclass(frozen=True)
class Job:
    """What one run needs to know."""

    padding_free: bool
    model: str
    layers: int | None
    examples: str
    """A JSON file of lists of token ids, in training order."""
    batch_size: int
    learning_rate: float
    threads: int
    scratch: str


class Message(TypedDict, total=False):
    """A line that a worker writes: the stage that begins, or a step that is done and its loss; at last the run."""

    stage: str
    step: int
    loss: float
    run: dict[str, object]
