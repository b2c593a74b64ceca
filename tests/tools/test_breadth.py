"""A slice of `nox -s breadth`: an architecture of each kind, and that a broken way, or none, is not called exact."""

from __future__ import annotations

import json

import pytest

import breadth
import breadth_page
import matrix
from known_models import NAMES
from padfree_patch import PadfreeError, apply, versions
from padfree_patch.attention import sdpa
from padfree_patch.wrapping.opt_in import OptIn

SLICE = {
    "bart": "fast, named modules",  # positions counted inside
    "bloom": "per sequence",  # ALiBi beside the interface
    "deepseek_v3": "registered",  # MLA: v has another head size
    "deepseek_v32": "per sequence",  # learned sparsity
    "gemma2": "registered",  # softcap
    "gpt2": "fast",  # until 4.52 its mask is reshaped by the number of rows
    "gpt_oss": "fast",  # sinks
    "mimo_v2_flash": "fast",  # sinks in some layers only, and v has another head size
    "inkling_text": "per sequence",  # a bias on scores
    "lfm2": "fast, mixers per sequence",  # convolutions
    "llama": "registered",
    "llama4_text": "per sequence",  # chunks, and a scale that counts tokens
    "marian": "fast, named modules",  # positions that are told a shape
    "mamba2": "per sequence",  # a state-space model
    "qwen2_5_vl_text": "fast",  # positions of three axes
    "qwen3_next": "fast, mixers per sequence",  # gated delta net
    "recurrent_gemma": "fast, mixers per sequence",  # on 4.x its state stays at the module
    "rwkv": "per sequence, named modules",
}
"""How each is kept apart on transformers 5."""


def row_or_skip(model_type, apply_to=apply):
    row = breadth.row_of(model_type, "default", apply_to)
    if row["verdict"] in ("not built", "upstream fails"):
        pytest.skip(row["why"])
    return row


@pytest.mark.versions
@pytest.mark.parametrize("model_type", SLICE)
def test_packed_row_is_exact(model_type):
    row = row_or_skip(model_type)
    if model_type == "recurrent_gemma" and versions.transformers("<4.44"):
        assert row["verdict"] == "refused", row  # docs/support.md has the report
        return
    assert row["verdict"] == "exact", row
    if versions.transformers(">=5"):
        assert row["kind"] == SLICE[model_type], row


@pytest.mark.parametrize("model_type", ["bloom", "llama", "mamba2", "qwen3_next"])
def test_unpatched_models_mix(model_type):
    row = row_or_skip(model_type, lambda model: model)
    assert row["verdict"] == "WRONG"
    assert row["logits"] > 100 * breadth.LOGIT_BAR


def test_broken_kernel_is_found(monkeypatch):
    right = sdpa.attend
    monkeypatch.setattr(sdpa, "attend", lambda *args, **options: 1.001 * right(*args, **options))
    assert row_or_skip("llama", lambda model: apply(model, verify=False))["verdict"] == "WRONG"


def test_what_goes_wrong_under_checkpointing_only_is_found(monkeypatch):
    never = property(lambda opt_in: 0, lambda opt_in, answered: None)  # so no module knows that it runs again
    monkeypatch.setattr(OptIn, "answered", never, raising=False)

    def apply_forgetfully(model):
        """Patches a model and forgets which of its modules must not be run again."""
        apply(model)
        for module in model.modules():
            if opt_in := OptIn.of(module):
                opt_in.not_recomputed = ()

    row = row_or_skip("rwkv", apply_forgetfully)
    assert row["logits"] < breadth.LOGIT_BAR
    assert row["gradients"] < breadth.GRADIENT_BAR
    assert row["verdict"] == "WRONG", row["checkpointed"]


@pytest.mark.parametrize(("error", "verdict"), [(PadfreeError, "refused"), (RuntimeError, "crashed")])
def test_error_of_apply_is_a_refusal_only_if_it_is_ours(error, verdict):
    def fail(model):
        raise error("why")

    assert row_or_skip("llama", fail)["verdict"] == verdict


def test_merged_rows_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(breadth_page, "FILE", tmp_path / "breadth.json")
    exact = {"verdict": "exact", "kind": "fast", "logits": 0.0, "gradients": 1.23e-6, "seconds": 0.1}
    rows = {
        "qwen3": {**exact, "checkpointed": {"reentrant": "WRONG: gradients 1"}},
        "gemma2": {**exact, "checkpointed": {"reentrant": "refused: why"}},
        "opt": {"verdict": "refused", "why": "a\nreason"},
    }
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "5.0.0.json").write_text(json.dumps({"default": rows, "eager": {"opt": rows["opt"]}}))
    breadth_page.merge(tmp_path / "found")
    page = breadth_page.section(breadth_page.read())
    assert "| Gemma 2 | gemma2 | fast, no checkpointing |" in page
    assert "- opt, on 5.0.0 (default), 5.0.0 (eager): refused: a reason" in page
    assert "- qwen3, on 5.0.0 (default): reentrant checkpointing: WRONG: gradients 1" in page
    assert any(line.startswith("| 5.0.0 | eager | 0 | 1 |") for line in page)


def test_page_is_what_the_tables_say():
    found = breadth_page.read()
    assert matrix.PAGE.read_text() == matrix.page(json.loads(matrix.CELLS.read_text()), breadth_page.section(found))
    assert set(NAMES.values()) <= found["5.24.0"]["default"].keys()


def test_nothing_in_the_table_is_silently_wrong():
    """What the run of all found; a row that crashed or is wrong is a fault to mend, not a line to write."""
    tables = [rows for version in breadth_page.read().values() for rows in version.values()]
    assert not [(name, row) for rows in tables for name, row in rows.items() if row["verdict"] in ("WRONG", "crashed")]
