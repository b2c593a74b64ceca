"""What a run measured, and what a comparison of two runs shows."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from ..measure import crowding
from ..verification import Verification

TOLERANCE = 1e-4
"""Largest difference of the two losses at any step; float32 rounding stays well under it."""


@dataclasses.dataclass
class Run:
    """One training run. Lists have one entry per step."""

    probe: Verification
    losses: list[float]
    real_tokens: list[int]
    row_tokens: list[int]
    """Tokens that the model computed: real ones and pads."""
    step_seconds: list[float]
    """Making the batch, forward, backward and optimizer."""
    loaded_bytes: int
    """Resident memory with the model loaded, before the first step."""
    peak_bytes: int
    """Most resident memory during training."""
    waited_share: float
    """Share of its threads' time that it waited for a CPU that others used; nan if not known."""

    @property
    def tokens_per_second(self) -> float:
        """Returns real tokens per second, without the first step, which warms up allocator and kernels."""
        return sum(self.real_tokens[1:]) / sum(self.step_seconds[1:])

    @property
    def padding_share(self) -> float:
        """Returns the share of pads among all tokens that the model computed."""
        return 1 - sum(self.real_tokens) / sum(self.row_tokens)

    @property
    def growth_bytes(self) -> int:
        """Returns the memory that training added to the loaded model: gradients, optimizer state, activations."""
        return self.peak_bytes - self.loaded_bytes

    def as_json(self) -> dict[str, object]:
        """Gives every field and figure; the probe with its text."""
        return dataclasses.asdict(self) | {
            "probe": self.probe.as_dict() | {"text": str(self.probe)},
            "tokens_per_second": self.tokens_per_second,
            "padding_share": self.padding_share,
            "growth_bytes": self.growth_bytes,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Run:
        """Makes a `Run` of what a worker sent: its fields, as `dataclasses.asdict` gives them."""
        return cls(**{**fields, "probe": Verification.from_dict(fields["probe"])})


@dataclasses.dataclass
class Comparison:
    """The same training, padded with the model unpatched, and padding-free with the model patched."""

    settings: Mapping[str, object]
    padded: Run
    padding_free: Run

    @property
    def loss_differences(self) -> list[float]:
        return [abs(a - b) for a, b in zip(self.padded.losses, self.padding_free.losses)]

    @property
    def speedup(self) -> float:
        return self.padding_free.tokens_per_second / self.padded.tokens_per_second

    def crowded(self) -> list[str]:
        """Lists the runs that waited for the CPU so long that their speed, and the ratio of both, say nothing."""
        return [
            f"other programs used the CPU during the {name} run (it waited {run.waited_share:.0%} of its time): "
            "the speeds are not reliable, run it again when the machine is idle or with fewer --threads"
            for name, run in (("padded", self.padded), ("padding-free", self.padding_free))
            if run.waited_share > crowding.LIMIT
        ]

    def problems(self) -> list[str]:
        """Lists why the two runs are not the same training; nothing if they are."""
        problems = []
        if not self.padding_free.probe.ok:
            problems.append(str(self.padding_free.probe.error("the patched model")))
        if self.padded.real_tokens != self.padding_free.real_tokens:
            problems.append("the two runs were given different batches")
        for step, difference in enumerate(self.loss_differences, 1):
            if not difference <= TOLERANCE:  # nan is a problem too
                padded, packed = self.padded.losses[step - 1], self.padding_free.losses[step - 1]
                problems.append(
                    f"losses differ by {difference:.2g} at step {step} (padded {padded:.6f}, "
                    f"padding-free {packed:.6f}); the limit is {TOLERANCE:g}"
                )
                break
        return problems

    def as_text(self) -> str:
        """Gives everything measured as one JSON object."""
        return json.dumps(self.as_json(), indent=2)

    def as_json(self) -> object:
        """Gives everything measured; numbers that JSON cannot hold (nan, inf) become null."""
        return null_if_not_finite(
            {
                "ok": not self.problems(),
                "problems": self.problems(),
                "settings": self.settings,
                "speedup": None if self.crowded() else self.speedup,
                "speeds_unreliable": self.crowded(),
                "largest_loss_difference": max(self.loss_differences, key=lambda x: (math.isnan(x), x)),
                "loss_tolerance": TOLERANCE,
                "padded": self.padded.as_json(),
                "padding_free": self.padding_free.as_json(),
            }
        )


def null_if_not_finite(value: object) -> object:
    """Replaces nan and inf by None, also inside lists and dicts."""
    if isinstance(value, Mapping):
        return {key: null_if_not_finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [null_if_not_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
