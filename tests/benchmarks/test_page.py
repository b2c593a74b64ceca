"""docs/benchmarks.md says what the results beside it say, and those are of benchmarks that still run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as for a script of that folder
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_the_one_that_the_results_make(report):
    assert report.PAGE.read_text() == report.page()


def test_page_changes_with_the_results(report, tmp_path, monkeypatch):
    """The control."""
    for path in report.RESULTS.glob("*.json"):
        found = json.loads(path.read_text())
        if path.stem == "overhead":
            found["apply_32_layers_seconds"] = 123.456
        (tmp_path / path.name).write_text(json.dumps(found))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert "**123456.0 ms**" in report.page()
