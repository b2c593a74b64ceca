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


def test_sentences_of_the_readme_say_what_was_measured(report):
    """Its tables are written by scripts; these figures by hand."""

    def of(name):
        return json.loads((report.RESULTS / f"{name}.json").read_text())

    shared = {2: [], 8: []}
    for shape in sorted(of("shared_prompts")["shapes"], key=lambda shape: shape["prompt"]):
        shared[shape["group"]].append(f"{shape['speedup']['median']:.1f}")
    native = [each["packed_over_native"]["median"] for each in of("step")["ratios"]]
    (longest,) = (row["medians"] for row in of("scaling")["rows"] if row["tokens"] == 16384)
    readme = " ".join((ROOT / "README.md").read_text().split())
    for sentence in (
        f"a step on pairs is another {shared[2][0]}, {shared[2][1]} and {shared[2][2]} x as fast",
        f"on groups of 8 answers {', '.join(shared[8][:2])} and {shared[8][2]} x",
        f"{min(native):.1f} to {max(native):.0f} times as fast on real batches",
        f"{longest['native'] / longest['packed']:.1f} times on a row of 16,384",
    ):
        assert sentence in readme


def test_page_changes_with_the_results(report, tmp_path, monkeypatch):
    """The control."""
    for path in report.RESULTS.glob("*.json"):
        found = json.loads(path.read_text())
        if path.stem == "overhead":
            found["apply_32_layers_seconds"] = 123.456
        (tmp_path / path.name).write_text(json.dumps(found))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert "**123456.0 ms**" in report.page()
