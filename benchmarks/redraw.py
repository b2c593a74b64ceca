"""Draws the pictures in docs/benchmarks again from the results beside them, without measuring anything.

.venv/bin/nox -s benchmark -- redraw
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import attention_options
import memory
import packing
import per_sequence
import scaling
import step
from common import RESULTS
from matplotlib.figure import Figure

import attention

PICTURES = {
    "step": (step.picture, "ratios"),
    "attention": (attention.picture, "speeds"),
    "attention_options": (attention_options.picture, "found"),
    "per_sequence": (per_sequence.picture, "models"),
    "memory": (memory.picture, "found"),
    "packing": (packing.picture, "rows"),
    "scaling": (scaling.picture, "rows"),
}
"""By the name of the result: what draws it, and the part of the result that is drawn."""


def pictures() -> Iterator[tuple[str, Figure]]:
    """Yields each picture with its name."""
    for name, (picture, part) in PICTURES.items():
        yield name, picture(json.loads((RESULTS / f"{name}.json").read_text())[part])


if __name__ == "__main__":
    for name, figure in pictures():
        figure.savefig(RESULTS / f"{name}.png", dpi=130)
        print(f"wrote {RESULTS / name}.png")
