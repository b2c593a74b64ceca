"""What docs/faults.md names exists, and carries the mark where the page says so."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "faults.md"
NAMED = re.compile(r"`(test_\w+(?:\.py)?|\w+_checks?\.py)`")


def rows() -> list[tuple[str, str]]:
    """Returns the tests of each fault, and where they run, as the page has them."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    return [tuple(line.strip("| ").split(" | ")[2:]) for line in lines]


def test_every_fault_is_still_found_by_a_test():
    files = {path: path.read_text() for path in TESTS.rglob("*.py") if path != Path(__file__)}
    for tests, runs in rows():
        found = []
        for name in NAMED.findall(tests):
            texts = [text for path, text in files.items() if path.name == name or f"def {name}(" in text]
            assert texts, f"{name} is no test any more"
            found += texts
        if runs.startswith("marked"):
            assert any("mark.versions" in text for text in found), tests
