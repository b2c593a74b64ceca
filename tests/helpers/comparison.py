"""Two trainings compared, and where it is kept how close they came."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import NamedTuple

import pytest
import torch

SAME_LOSS = 2e-4
"""Trainers log four digits."""

SAME_WEIGHTS = 1e-4
"""Of a parameter's way: sums in another order."""

LEARNING_RATE = 0.1
"""Of trainings that are compared: with 0.01, one weight near 1 that float32 rounds the other way is 3e-4 of its way."""


class Training(NamedTuple):
    losses: list[float]
    evaluation: float | None
    weights: list[torch.Tensor]


def assert_same_training(found: Training, expected: Training, before, measured=None, claim="", **context) -> None:
    """Losses step by step, the evaluation's, and where every parameter ended, seen from where it began."""
    apart = max(abs(a - b) for a, b in zip(found.losses, expected.losses, strict=True))
    assert apart <= SAME_LOSS
    if expected.evaluation is not None:
        assert found.evaluation == pytest.approx(expected.evaluation, rel=1e-5)
    of_ways = [
        ((now - wanted).norm() / (wanted - was).norm()).item()
        for now, wanted, was in zip(found.weights, expected.weights, before, strict=True)
    ]
    assert max(of_ways) <= SAME_WEIGHTS
    if measured is not None:
        measured(claim, steps=len(found.losses), loss=apart, weights=max(of_ways), **context)


def written(claim: str, *, library: str = "", **figures: float) -> str:
    """What is kept of a comparison, with the version of the library that it was about."""
    beside = f"{library} {version(library)}" if library else ""
    return json.dumps({"claim": claim, "transformers": version("transformers"), "beside": beside, **figures})


def gradients_apart(found, expected, *, together: bool = False) -> float:
    """Norm of the difference over that of the gradient: the largest of all parameters, or of all together."""
    pairs = [(found[name].float() - wanted.float(), wanted.float()) for name, wanted in expected.items()]
    if together:
        pairs = [tuple(torch.cat([each.flatten() for each in side]) for side in zip(*pairs))]
    return max((difference.norm() / wanted.norm()).item() for difference, wanted in pairs)
