"""What upstream does unpatched is measured as people call it, and the page says no more than what was measured."""

from __future__ import annotations

import json

import pytest
import torch

import upstream_ways
import upstream_ways_page
from padfree_patch.registry import registry
from padfree_patch.testing import examples

LLAMA = registry().get("llama")


def test_patched_model_would_be_called_exact():
    """The control: what mixes is measured, not assumed."""

    def patched(model, sequences):
        from padfree_patch import apply

        return upstream_ways.plainly(apply(model), sequences)

    assert upstream_ways.word_for(LLAMA, "sdpa", patched) == "exact"
    assert upstream_ways.word_for(LLAMA, "sdpa", upstream_ways.plainly) == "mixes"
    assert upstream_ways.word_for(LLAMA, "sdpa", lambda *_: 1 / 0) == "fails"


def test_lengths_are_those_of_transformers_own_collator():
    transformers = pytest.importorskip("transformers", minversion="4.54")
    sequences = examples((3, 2))
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    theirs = collator([{"input_ids": each[0].tolist()} for each in sequences])
    ours = upstream_ways.lengths_of(sequences)
    assert {name: torch.as_tensor(theirs[name]).tolist() for name in ours} == {
        name: torch.as_tensor(value).tolist() for name, value in ours.items()
    }


def test_page_groups_versions_and_names_the_exceptions(tmp_path, monkeypatch):
    for name in ("PAGE", "FOUND", "README"):
        monkeypatch.setattr(upstream_ways_page, name, tmp_path / name)
    upstream_ways_page.README.write_text(f"before\n{upstream_ways_page.BEGIN}\n{upstream_ways_page.END}\nafter\n")
    (tmp_path / "found").mkdir()
    for version, way, words in (
        ("4.52.4", "model(**batch)", {"mixes": ["falcon", "llama"]}),
        ("4.53.3", "model(**batch)", {"exact": ["llama", "phi"], "mixes": ["falcon"]}),
        ("5.0.0", "use_cache=False", {"exact": ["llama", "phi"], "mixes": ["falcon"]}),
    ):
        of_each = {name: dict.fromkeys(upstream_ways.WAYS, words) for name in ("sdpa", "eager", "flash_attention_2")}
        found = {"trainer": way, **of_each}
        (tmp_path / "found" / f"{version}.json").write_text(json.dumps(found))
    upstream_ways_page.merge(tmp_path / "found")
    page = upstream_ways_page.PAGE.read_text()
    assert "| 4.53.3, 5.0.0 | isolated; **mixes**: falcon |" in page and "\n| 4.52.4 | **mixes** |" in page
    readme = upstream_ways_page.README.read_text()
    assert "| 4.53.3, 5.0.0 | isolated, most |" in readme
    assert readme.startswith("before\n") and readme.endswith("\nafter\n")
    assert "`use_cache` on in 4.52.4 to 4.53.3, and switches it off in 5.0.0" in page
