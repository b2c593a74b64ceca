"""docs/peft.md says of each method what came of it, and is not rewritten from a part of the versions."""

from __future__ import annotations

import json

import pytest

from peft_page import PAGE, rows_on, text_of, versions_on, write_page


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("exact", "exact"),
        (
            "refused: PeftModelForCausalLM with CPTConfig puts tokens before each row; pad",
            "refused: puts tokens before each row",
        ),
        (
            "refused: PeftModelForCausalLM with LoraConfig (VeLoRA) estimates gradients; pad",
            "refused: estimates gradients",
        ),
        (
            "refused: PeftModel with AConfig, which came after padfree_patch.apply, can't run a row: E(); call",
            "refused: can't run a row: E()",
        ),
        (
            "refused: PeftModel fails too, on a call with one example: E(). So it stays. Or",
            "refused: fails too, on a call with one example: E()",
        ),
        (
            "refused: PeftModel with AConfig, which came after padfree_patch.apply, does not isolate its examples; c",
            "refused, until `apply` is called again: it brings a decoder of its own",
        ),
    ],
)
def test_refusal_is_told_without_names_and_advice(said, written):
    found = {
        "peft": "0.7.1",
        "transformers": "4.36.2",
        "methods": {"A": {order: {"said": said} for order in ("before", "after")}},
    }
    assert list(rows_on(text_of([found]))) == [("A", written, {"0.7.1"})]


def test_page_of_several_versions_is_not_written_from_one(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    (tmp_path / "1.json").write_text(json.dumps({"peft": "0.99", "transformers": "6.0", "methods": {}}))
    write_page(tmp_path, page)
    assert page.read_text() == PAGE.read_text()
    page.write_text("")
    write_page(tmp_path, page)  # the control
    assert versions_on(page.read_text()) == {"0.99"}
    assert len(versions_on(PAGE.read_text())) > 5
