"""What docs/faults.md names exists, and runs where the page says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "faults.md"
NAMED = re.compile(r"`(test_\w+(?:\.py)?|\w+_checks?\.py)`")


def rows() -> list[tuple[str, str]]:
    """Returns the tests of each fault, and where they run, as the page has them."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    return [tuple(line.strip("| ").split(" | ")[2:]) for line in lines]


@pytest.fixture(scope="module")
def marked():
    """Whether each test, and each file of tests, has the mark `versions`, by name."""
    found = {}
    for path in TESTS.rglob("*.py"):
        tree = ast.parse(path.read_text())
        of_file = any("mark.versions" in ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign))
        tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        of_tests = {
            node.name: of_file or "mark.versions" in " ".join(map(ast.unparse, node.decorator_list)) for node in tests
        }
        found.update({**of_tests, path.name: any(of_tests.values())})
    return found


def wrong(tests: str, runs: str, marked: dict[str, bool]) -> str | None:
    """Says what is not so in a row of the page; None if all is."""
    names = NAMED.findall(tests)
    if missing := [name for name in names if name not in marked]:
        return f"{', '.join(missing)}: no test any more"
    marks = {marked[name] for name in names}
    said = [("marked" in part, "whole" in part) for part in re.split("[;,]", runs)]
    if any(is_marked for is_marked, _ in said) and True not in marks:
        return f"{tests}: not marked"
    if any(is_whole for _, is_whole in said) and not any(is_marked for is_marked, _ in said) and True in marks:
        return f"{tests}: marked"
    if runs == "marked" and False in marks:
        return f"{tests}: not all are marked"
    return None


def test_every_fault_is_still_found_by_a_test(marked):
    assert len(rows()) > 100
    assert [found for row in rows() if (found := wrong(*row, marked))] == []


@pytest.mark.parametrize(
    ("tests", "runs", "found"),
    [
        ("`test_faults.py`", "marked", "not marked"),
        ("`test_training_page.py`", "whole", "marked"),
        ("`test_faults.py`, `test_training_page.py`", "marked", "not all are marked"),
        ("`test_that_is_gone`", "whole", "no test any more"),
        ("`test_faults.py`, `test_training_page.py`", "whole; the last marked", None),
    ],
)
def test_row_that_is_not_so_is_found(tests, runs, found, marked):
    """The control."""
    assert (wrong(tests, runs, marked) or "").endswith(found or "")
