"""Two gloo processes under torchrun, with different numbers of sequences, end with one process's loss and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from helpers import two_processes
from helpers.comparison import SAME_WEIGHTS, assert_same_training
from helpers.training import flattening, trained

pytestmark = [
    pytest.mark.versions,  # on two of them: noxfile.py
    pytest.mark.xdist_group("distributed"),  # `both` is made once, not by each of pytest's processes
]

AVERAGES_OVER_RANKS = getattr(TrainingArguments, "average_tokens_across_devices", False)
"""Whether the Trainer, as it comes, takes the mean over all ranks' tokens and not the mean of the ranks' means."""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return two_processes.torchrun(Path(two_processes.__file__), tmp_path_factory.mktemp("ranks"))


@pytest.fixture
def found(both):
    """What each rank found."""
    return both[0]


@pytest.mark.parametrize("way", two_processes.WAYS)
@pytest.mark.parametrize("name", two_processes.HERE)
def test_two_processes_are_one(found, measured, name, way):
    model = two_processes.apply(two_processes.MODELS[name]())
    loss = model(**two_processes.batch_of(slice(None))).loss
    loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for rank in found:
        mine = rank[name, way]
        torch.testing.assert_close(mine["loss"], loss.detach())
        assert set(mine["gradients"]) == set(expected)
        apart = max(((mine["gradients"][at] - each).norm() / each.norm()).item() for at, each in expected.items())
        assert apart <= SAME_WEIGHTS
        claim = f"{way}, two processes against one" if name == "llama" else f"{way}, {name}, two processes against one"
        measured(claim, steps=two_processes.STEPS, loss=abs(mine["loss"] - loss).item(), gradients=apart)


@pytest.mark.parametrize("packed", ["packed", "stream"])
def test_trainer_of_two_processes_trains_like_a_padded_one(found, measured, packed):
    padded = "stream, padded" if packed == "stream" else "padded"
    claim = f"Trainer, two processes (DDP), {'IterableDataset' if packed == 'stream' else 'map-style data set'}"
    for rank in found:
        before = two_processes.llama().parameters()
        assert_same_training(rank[packed], rank[padded], before, measured, claim, library="accelerate")
    torch.testing.assert_close(found[0][packed].weights, found[1][packed].weights, rtol=0, atol=0)  # one model


@pytest.mark.skipif(not AVERAGES_OVER_RANKS, reason="this Trainer takes the mean of the ranks' means")
def test_trainer_of_two_processes_trains_like_one(found, tmp_path, measured):
    alone = trained(
        two_processes.llama(), tmp_path, flattening(), patched=True
    )  # four examples a step, not two and two
    before, claim = two_processes.llama().parameters(), "Trainer, two processes (DDP) against one"
    # Evaluations are means of batches' means, and one process has other batches.
    packed, alone = (each._replace(evaluation=None) for each in (found[0]["packed"], alone))
    assert_same_training(packed, alone, before, measured, claim, library="accelerate")


def test_ranks_with_other_numbers_of_sequences_do_not_wait_for_each_other(found):
    """Packed rows, of which each rank has others; weights stay the same on both."""
    torch.testing.assert_close(found[0]["rows"].weights, found[1]["rows"].weights, rtol=0, atol=0)
    assert len(found[0]["rows"].losses) == 3


def test_token_budget_gives_each_rank_its_batches(found):
    torch.testing.assert_close(found[0]["budget"], found[1]["budget"], rtol=0, atol=0)
    for rank in found:
        taken, planned = rank["budget's steps"]
        assert taken == planned > 4


def test_classifier_on_two_processes_is_each_text_alone(found):
    expected = two_processes.classified()
    for rank in found:
        for name, gradient in rank["classifier"].items():
            assert (gradient - expected[name]).norm() <= SAME_WEIGHTS * expected[name].norm() + 1e-8, name


def test_recipe_of_a_token_budget_runs_on_two_processes(found):
    (weights, losses), (others, other_losses) = (rank["recipe"] for rank in found)
    torch.testing.assert_close(weights, others, rtol=0, atol=0)
    assert len(losses) > 1 and losses == other_losses


def test_figures_of_the_callback_are_those_of_the_run(found):
    """Rank 0 counted 10,000 tokens in 1000 seconds, rank 1 20,000."""
    (counted, logged), (other, also_logged) = (rank["figures"] for rank in found)
    assert counted == other and logged == also_logged and len(logged) == 3
    assert counted["tokens_per_second"] == pytest.approx(30, rel=0.1)
    assert counted["padding_saved"] == 1 - 30000 / 240000
    assert counted["sequences_per_row"] == round(16 / 3, 2)
    assert all(each["sequences_per_row"] == 2 for each in logged)


def test_batches_dealt_out_by_one_process_are_refused(both):
    """Rows of different lengths can't be put together to be dealt out: the error ends the run on both ranks."""
    assert both[1].returncode != 0
    assert "Sizes of tensors must match" in both[1].stdout  # newer accelerates say then what to do
