"""What tools/door.py measures the door with, and what docs/tools.md says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import padfree_patch
from door_assets import write_configs
from door_page import BEGIN, END, HEAD, row_of
from door_probe.sitecustomize import Probe
from door_runs import RUNS

DOCS = Path(__file__).parents[2] / "docs"
END_TOKEN, PADDING = 90, 89  # of the tiny model's vocabulary of 96
FOUND = json.loads((DOCS / "tools.json").read_text())


def row(*lengths, tail=0):
    """One row of examples, each with an end token, and padding behind them."""
    generator = torch.Generator().manual_seed(0)
    ids, positions = [], []
    for length in lengths:
        ids += [*torch.randint(3, 80, (length - 1,), generator=generator).tolist(), END_TOKEN]
        positions += range(length)
    return {
        "input_ids": torch.tensor([[*ids, *[PADDING] * tail]]),
        "position_ids": torch.tensor([[*positions, *[0] * tail]]),
        "attention_mask": torch.ones(1, sum(lengths) + tail, dtype=torch.int64),  # LLaMA-Factory's
        "labels": torch.zeros(1, sum(lengths) + tail, dtype=torch.int64),
    }


def probed(model, batch):
    probe = Probe(END_TOKEN, PADDING)
    probe.steps = True  # as Trainer.training_step sets it
    probe(model, (), batch)
    (found,) = probe.found
    return found


def test_probe_measures_what_mixes_and_what_does_not(llama):
    """The control is the same row without the patch."""
    mixed = probed(llama, row(5, 4, 6, tail=3))
    assert (mixed["examples"], mixed["rows"]) == (3, 1) and min(mixed["change"], mixed["alone"]) > 1e-3
    padfree_patch.apply(llama)
    exact = probed(llama, row(5, 4, 6, tail=3))
    assert exact["change"] == 0 and exact["alone"] <= 2e-5
    assert exact["given"] == ["attention_mask", "input_ids", "position_ids", "use_cache"]


def test_probe_tells_padded_rows_from_packed_ones(llama):
    right, left = [5, 6, END_TOKEN, PADDING, PADDING], [PADDING, PADDING, 7, 8, END_TOKEN]
    tokens = torch.tensor([right, left])
    found = probed(llama, {"input_ids": tokens, "attention_mask": (tokens != PADDING).long()})
    assert (found["examples"], found["rows"]) == (2, 2) and found["change"] == 0
    probe = Probe(END_TOKEN, PADDING)
    assert probe.spans([5, END_TOKEN, 6, 7]) == [slice(0, 2), slice(2, 4)]  # cut off
    probe(llama, (), row(5, 4))
    assert not probe.found  # in no training step: a check of the door


def test_probe_measures_what_labels_across_boundaries_do_to_the_loss(llama):
    """The control is the same row without the patch; labels that are ignored already do nothing."""
    batch, ids = row(5, 4, 6), row(5, 4, 6)["input_ids"]
    assert probed(llama, {**batch, "labels": ids})["labels"] > 1e-3
    masked = ids.clone()
    masked[0, [5, 9]] = -100
    shifted = torch.cat([masked[:, 1:], torch.tensor([[-100]])], dim=1)
    for labels in ({"labels": masked}, {"labels": masked, "shift_labels": shifted}):
        assert probed(llama, {**batch, **labels})["labels"] == 0
    padfree_patch.apply(llama)
    assert probed(llama, {**batch, "labels": ids})["labels"] == 0
    unlabelled = {name: batch[name] for name in ("input_ids", "position_ids")}
    for given in (unlabelled, {**batch, "labels": ids[:, 3:], "logits_to_keep": 12}):
        assert probed(llama, given)["labels"] is None


def test_a_tools_own_slot_is_what_a_plug_in_is_run_in(tmp_path):
    write_configs(tmp_path)
    plain, plugged_in = (json.loads((tmp_path / f"axolotl{each}.yml").read_text()) for each in ("", "-plugged-in"))
    assert plugged_in == {**plain, "plugins": ["padfree_patch.integrations.axolotl.PadfreePlugin"]}
    for run in RUNS:
        if run.plugged_in:
            assert "our plug-in" in run.how and "padfree-patch" not in run.command_with_door
            assert len(set(run.command_with_door) - set(run.command)) in (1, 2)
        else:
            assert run.command_with_door == ("padfree-patch", "run", "--", *run.command)


def test_every_run_was_measured_and_nothing_else_is_there():
    assert list(FOUND) == [run.key for run in RUNS]


def test_page_is_made_of_what_was_measured():
    table = (DOCS / "tools.md").read_text().partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    assert table == [*HEAD, *(row_of(name, finding) for name, finding in FOUND.items())]


@pytest.mark.parametrize("name", FOUND)
def test_door_isolates_wherever_a_batch_says_where_examples_end(name):
    before, after = FOUND[name]["without"], FOUND[name]["with"]
    if "wrapped" in name or "padded (" in name:
        assert any("switch on" in line for line in after["said"])
        return
    assert after["status"] == 0 and after["packed"] and after["change"] == 0 and after["alone"] <= 2e-5
    assert after["verified"] == 1 and after["processes"] == before["processes"]
    assert not after["labels"]
    if before["change"] == 0 and not before["labels"]:  # upstream was right
        assert max(abs(a - b) for a, b in zip(before["losses"], after["losses"], strict=True)) <= 2e-4
