"""Writes docs/upstream-tests.md from docs/upstream-tests.json, to which tools/upstream_tests.py adds what it finds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.version import Version

PAGE = Path(__file__).parents[1] / "docs" / "upstream-tests.md"
DATA = PAGE.with_suffix(".json")

Outcomes = Mapping[str, Mapping[str, Any]]
"""Test -> the fields of `upstream_plugin.Outcome`."""
Counts = dict[str, Any]
"""What came of the tests of one architecture: the numbers of COUNTS, and under LISTS what is to be read."""

COUNTS = {
    "tests": "tests",
    "skipped": "skipped",
    "passed": "pass without",
    "passed with": "pass with",
    "building": "of them build models",
    "models": "models",
}
LISTS = {"broken": "Pass without, and not with:", "refused": "What `apply` refused:"}

HEAD = """# transformers' own model tests

What padfree_patch does not pack must stay as it is. The measure is transformers' own tests of its models. Each ran
twice with the same seeds: as it is, and with `apply` on every model of a supported type that it builds. What passes
without must pass with.

transformers' releases come without tests. In a clone of https://github.com/huggingface/transformers check out the tag
of a release, or a commit named below, and run

```bash
{command}
```

which installs what was checked out, runs both, and writes its rows of this page. Test files and other options of pytest
may follow. Skipped is what needs a GPU, the network or a package that is not there, and what transformers leaves out.
The models are those that `apply` took in tests that pass without it.
"""


def update(version: str, about: Mapping[str, str], found: Mapping[str, Counts]) -> None:
    """Puts what was found of some architectures into the page; other commits or options begin the version anew."""
    known = json.loads(DATA.read_text()) if DATA.exists() else {}
    before = known.get(version, {})
    same = all(before.get(key) == value for key, value in about.items())
    rows = before["architectures"] if same and before else {}
    known[version] = {**about, "architectures": {**rows, **found}}
    DATA.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(known))


def page(known: Mapping[str, Any]) -> str:
    versions = sorted(known, key=Version, reverse=True)
    command = f".venv/bin/nox -s upstream -- CHECKOUT --page {known[versions[0]]['options']}".strip()
    paragraphs = [paragraph for each in versions for paragraph in section(each, known[each])]
    return HEAD.replace("{command}", command) + "".join(f"\n{paragraph}\n" for paragraph in paragraphs)


def section(version: str, found: Mapping[str, Any]) -> Iterator[str]:
    """Yields the paragraphs about one version."""
    rows: dict[str, Counts] = found["architectures"]
    commit = f" ({found['commit']})" if found["commit"] else ""
    yield f"## {version}"
    options = f", with `{found['options']}`" if found["options"] else ""
    yield f"transformers {version}{commit} on torch {found['torch']}{options}."
    total = {key: sum(each[key] for each in rows.values()) for key in COUNTS}
    lines = [row(name, rows[name]) for name in sorted(rows)]
    yield "\n".join([line(["", *COUNTS.values()]), line(["---"] * (len(COUNTS) + 1)), *lines, row("all", total)])
    for key, title in LISTS.items():
        if said := [f"- {each}" for name in sorted(rows) for each in rows[name][key]]:
            yield "\n".join([title, "", *said])


def row(name: str, counts: Counts) -> str:
    return line([name, *(str(counts[key]) for key in COUNTS)])


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def count(without: Outcomes, with_apply: Outcomes, broken: Mapping[str, str]) -> dict[str, Counts]:
    """Counts what came of the tests of each architecture."""
    names = {architecture(test) for test in without}
    return {
        name: counts_of([test for test in without if architecture(test) == name], without, with_apply, broken)
        for name in sorted(names)
    }


def counts_of(tests: list[str], without: Outcomes, with_apply: Outcomes, broken: Mapping[str, str]) -> Counts:
    passed = [test for test in tests if without[test]["outcome"] == "passed"]
    models = [with_apply[test]["applied"] for test in passed if test in with_apply]
    refused = {reason.split(";")[0] for test in tests for reason in with_apply.get(test, {}).get("refused", [])}
    return {
        "tests": len(tests),
        "skipped": sum(without[test]["outcome"] == "skipped" for test in tests),
        "passed": len(passed),
        "passed with": sum(test not in broken for test in passed),
        "building": sum(each > 0 for each in models),
        "models": sum(models),
        "broken": [f"`{test}`: {broken[test]}" for test in passed if test in broken],
        "refused": sorted(refused),
    }


def architecture(test: str) -> str:
    """Names the architecture of a test.

    >>> architecture("tests/models/qwen2/test_modeling_qwen2.py::Qwen2ModelTest::test_config")
    'qwen2'
    """
    return Path(test.split("::")[0]).parent.name
