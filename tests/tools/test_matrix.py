"""The matrix calls a cell wrong whatever part of it is, and `--compare` finds every cell that has changed."""

from __future__ import annotations

import json

import pytest

import matrix
import upstream_ways_page
from padfree_patch import patching
from padfree_patch.attention import sdpa
from padfree_patch.patching import support
from padfree_patch.registry import registry
from padfree_patch.testing import CHECKS, checks

LLAMA = registry().get("llama")


def test_right_cell_is_exact():
    """The control of the two below."""
    assert matrix.verdict(LLAMA, "eager", {}, CHECKS) == "exact"


def test_wrong_kernel_is_a_wrong_cell(monkeypatch):
    monkeypatch.setattr(checks, "applied", lambda model: patching.applied(model, verify=False))
    right = sdpa.attend
    monkeypatch.setattr(sdpa, "attend", lambda *args, **options: 1.01 * right(*args, **options))
    assert matrix.verdict(LLAMA, "eager", {}, CHECKS).startswith("wrong: check_logits")


def test_model_that_does_not_verify_is_a_wrong_cell(monkeypatch):
    failed = patching.verification.Verification("Tiny", logit_change=1.0, leaked_gradient=0.0, alone_error=0.0)
    monkeypatch.setattr(checks, "applied", lambda model: patching.applied(model, verify=False))
    monkeypatch.setattr(patching.verification, "verify", lambda model: failed)
    assert matrix.verdict(LLAMA, "eager", {}, CHECKS).startswith("wrong: verify: LeakError")


def test_merged_table_is_the_one_that_the_package_reads(tmp_path, monkeypatch):
    assert matrix.TABLE.samefile(support.FILE)
    for name, file in {"CELLS": "cells.json", "TABLE": "table.json", "PAGE": "page.md"}.items():
        monkeypatch.setattr(matrix, name, tmp_path / file)
    monkeypatch.setattr(upstream_ways_page, "FOUND", tmp_path / "upstream.json")
    in_two_ways = {"model(**batch)": {"mixes": ["llama"]}, "use_cache=False": {"exact": ["llama"]}}
    upstream_ways_page.FOUND.write_text(json.dumps({"5.0.0": {"trainer": "model(**batch)", "sdpa": in_two_ways}}))
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "5.0.0.json").write_text(json.dumps({"llama": {"sdpa": {"default": "exact"}}}))
    matrix.merge(tmp_path / "found")
    assert json.loads(matrix.TABLE.read_text()) == {"5.0.0": {"llama": {"sdpa": "exact"}}}
    assert "| 5.0.0 | 0 of 1 exact | 1 of 1 exact | exact |" in matrix.PAGE.read_text()


@pytest.mark.parametrize(("known", "same"), [("exact", True), ("native-exact", True), ("wrong: x", False)])
def test_changed_cell_is_found(tmp_path, monkeypatch, known, same):
    monkeypatch.setattr(matrix, "CELLS", tmp_path / "cells.json")
    matrix.CELLS.write_text(json.dumps({"5.0.0": {"llama": {"sdpa": {"default": known}}}}))
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "5.0.0.json").write_text(json.dumps({"llama": {"sdpa": {"default": "exact"}}}))
    if same:
        matrix.compare(tmp_path / "found")
    else:
        with pytest.raises(SystemExit, match=r"'exact', in docs/support\.json 'wrong: x'"):
            matrix.compare(tmp_path / "found")


def test_a_quick_verdict_is_compared_without_what_it_left_out():
    gaps = "exact: but upstream fails check_cost: A: but upstream fails check_two_forwards: B"
    kept = gaps + ": but upstream fails check_gradients: C"
    assert matrix.forms_of(kept) == (kept, "exact: but upstream fails check_gradients: C")
    assert set(matrix.QUICK) < set(CHECKS)
