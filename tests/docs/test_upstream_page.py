"""docs/upstream.md says what transformers does by itself: measured again here, also through a real Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import upstream_ways
import upstream_ways_page
from helpers.training import data, trainer_of
from padfree_patch import DataCollatorWithFlattening, versions
from padfree_patch.registry import registry
from padfree_patch.testing.oracle import alone_loss_and_gradients

LLAMA = registry().get("llama")


@pytest.fixture
def here() -> dict[str, Any]:
    """What the table says of this version."""
    found = upstream_ways_page.read()
    version = str(versions.transformers_version())
    if version not in found:
        pytest.skip(f"transformers {version} is not in docs/upstream.json")
    return found[version]


@pytest.mark.versions
def test_table_says_what_is_measured_here(here):
    found = {way: upstream_ways.word_for(LLAMA, "sdpa", call) for way, call in upstream_ways.WAYS.items()}
    said = {way: next(word for word, names in here["sdpa"][way].items() if "llama" in names) for way in found}
    assert found == said


@pytest.mark.versions
def test_trainer_calls_in_the_way_that_the_page_says(llama, here, tmp_path):
    examples = data()[:4]
    alone, _ = alone_loss_and_gradients(lambda: llama, [torch.tensor([each["input_ids"]]) for each in examples])
    llama.zero_grad()
    trainer = trainer_of(llama, tmp_path, DataCollatorWithFlattening(), dataset=examples, max_steps=1)
    trainer.train()
    isolated = "llama" in here["sdpa"][here["trainer"]].get("exact", [])
    assert llama.config.use_cache is (here["trainer"] == "model(**batch)")
    assert (abs(trainer.state.log_history[0]["loss"] - alone) < 1e-4) is isolated


def test_page_is_drawn_from_the_table():
    found = upstream_ways_page.read()
    assert upstream_ways_page.PAGE.read_text() == upstream_ways_page.page(found)
    assert upstream_ways_page.readme_table(found) in upstream_ways_page.README.read_text()
