"""versions: one way to ask which transformers and which torch run."""

from __future__ import annotations

import pytest

from padfree_patch import versions


@pytest.mark.parametrize("ask", [versions.transformers, versions.torch])
def test_asks_for_the_version_that_runs(ask, monkeypatch):
    for running, expected in {"4.9.0": True, "4.46.0": False, "4.100.0": False, "4.46.0rc1": False}.items():
        monkeypatch.setattr(versions, "installed", lambda package: versions.Version(running))  # noqa: B023
        assert ask("<4.46") is expected


def test_local_parts_of_a_version_do_not_count(monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda package: versions.Version("2.5.0+cpu"))
    assert versions.torch("==2.5.0") and versions.torch(">=2.5") and not versions.torch(">2.5")


def test_a_range_is_parsed_once(monkeypatch):
    asked, parse = [], versions.SpecifierSet
    monkeypatch.setattr(versions, "SpecifierSet", lambda text: asked.append(text) or parse(text))
    assert versions.transformers(">=3.14159") and versions.transformers(">=3.14159")
    assert asked == [">=3.14159"]
