"""What a worker is told, and what it sends back on the way."""

from __future__ import annotations

import dataclasses
from typing import TypedDict

SMALL_MODEL_RATE, MODEL_RATE = 5e-4, 2e-5
"""Learning rates. Adam amplifies rounding: at 1e-3 the small model's losses come up to 3e-5 apart in 30 steps.

The losses of two padded runs that differ only in the number of pads then come 1e-5 apart. At 5e-4 both distances are
less than 3e-6 (seeds 0, 1, 2).
"""


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
