"""What an open project has: forms that ask for what helps, a hosted CI that runs `make test`, a release checklist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FORMS = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_ask_for_the_explanation(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"]
    asked = [
        part["attributes"].get("label", "") for part in form["body"] if part.get("validations", {}).get("required")
    ]
    assert "padfree-patch explain MODEL --json" in asked
    fields = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(set(fields)) == len(fields)


def test_a_form_takes_versions_that_nobody_tested():
    assert [path.stem for path in FORMS if "not in the tables" in path.read_text()] == ["version"]


def commands(workflow):
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / workflow).read_text())["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


def test_hosted_ci_runs_what_ci_runs():
    assert commands("ci.yml") == ["make test"]
    assert any("nox -s canary" in command for command in commands("canary.yml"))


def test_sessions_that_contributing_names_are_there():
    sessions = set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(), re.MULTILINE))
    text = (ROOT / "CONTRIBUTING.md").read_text()
    release = text.partition("\n## Release\n")[2].partition("\n## ")[0]
    named = re.findall(r"nox -s ([a-z_ ]+)", text)
    assert {name for names in named for name in names.split()} <= sessions
    assert all(f"nox -s {name}" in release for name in ("full", "canary", "upstream", "docs"))
