"""Tables and spreads, as docs/benchmarks.md shows them."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any


def spread_of(values: list[float]) -> str:
    return f"{median(values):.0f} ({min(values):.0f}-{max(values):.0f})"


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    columns = list(columns)
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def spread(each: dict[str, float] | None) -> str:
    """Writes median, smallest and largest."""
    return f"{each['median']:.2f} ({each['min']:.2f}-{each['max']:.2f})" if each else "-"
