"""Rows filled by best-fit decreasing, batches by a token budget: nothing lost, nothing over, little empty."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from padfree_patch import (
    DataCollatorWithFlattening,
    PadfreeError,
    TokenBudgetBatchSampler,
    plan_packing,
)


def uneven_lengths(count=3000, most=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(torch.randn(count, generator=generator) + 4.2).clamp(1, most).long().tolist()


def test_every_example_is_in_one_row_and_no_row_is_over():
    lengths = uneven_lengths()
    plan = plan_packing(lengths, 600)
    assert sorted(example for row in plan.rows for example in row) == list(range(len(lengths)))
    filled = [sum(lengths[example] for example in row) for row in plan.rows]
    assert max(filled) <= 600
    assert plan.waste == pytest.approx(1 - sum(filled) / (600 * len(filled)))
    assert plan.waste < 0.02  # each example in a row of its own would waste 80 %
    assert plan.steps(8, rows_per_step=2) == (375, -(-len(plan.rows) // 2))
    assert f"in {len(plan.rows)} rows" in str(plan)


def test_best_fit_is_the_fullest_row_that_has_room():
    """By hand: 6, then 5 does not fit beside it; 3 goes to the 5, 2 to the 6 (both have 2 left), 2 to the 5."""
    assert plan_packing([3, 5, 2, 6], 8).rows == [[3, 2], [1, 0]]
    assert plan_packing([4, 4, 4], 8).rows == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([], "no examples"), ([3, 0], "example 1 has 0 tokens"), ([3, 9, 8], "1 of 3 examples have more than 8 tokens")],
)
@pytest.mark.parametrize("use", [plan_packing, lambda lengths, most: TokenBudgetBatchSampler(lengths, max_tokens=most)])
def test_lengths_that_cannot_be_packed_are_errors(use, lengths, message):
    with pytest.raises(PadfreeError, match=message):
        use(lengths, 8)


@pytest.mark.parametrize("replicas", [1, 2, 3, 7])
def test_ranks_share_an_epoch_evenly(replicas):
    lengths = np.array(uneven_lengths(500))
    options = {"max_tokens": 600, "num_replicas": replicas}
    ranks = [list(TokenBudgetBatchSampler(lengths, rank=rank, **options)) for rank in range(replicas)]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) == len(TokenBudgetBatchSampler(lengths, rank=0, **options))
    seen = Counter(example for batches in ranks for batch in batches for example in batch)
    assert seen == Counter(range(500))
    assert all(lengths[batch].sum() <= 600 for batches in ranks for batch in batches)
    together = list(TokenBudgetBatchSampler(lengths, **options))
    assert [together[rank::replicas] for rank in range(replicas)] == ranks  # as accelerate deals them out


def test_batches_that_cannot_be_divided_come_again():
    """Three examples of which no two fit into a batch, and two ranks: a batch each, or one rank would wait for ever."""
    batches = list(TokenBudgetBatchSampler([5, 4, 5], max_tokens=5, num_replicas=2))
    assert sorted(batches) == [[0], [1], [1], [2]]


def test_batches_of_one_step_cost_alike():
    lengths = np.array(uneven_lengths(2000))
    batches = list(TokenBudgetBatchSampler(lengths, max_tokens=600, num_replicas=4))
    costs = np.array([(lengths[batch] ** 2).sum() for batch in batches]).reshape(-1, 4)
    slowest = costs.max(1).sum()
    shuffled = np.random.default_rng(0).permutation(costs.reshape(-1)).reshape(-1, 4).max(1).sum()
    assert slowest < 1.02 * costs.mean(1).sum() < shuffled  # the control: at random, ranks wait for each other


def test_epochs_differ_and_repeat():
    sampler = TokenBudgetBatchSampler(uneven_lengths(300), max_tokens=600)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first != second
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(TokenBudgetBatchSampler(uneven_lengths(300), max_tokens=600, seed=1)) != first


def test_resumes_in_the_middle_of_an_epoch():
    sampler = TokenBudgetBatchSampler(uneven_lengths(300), max_tokens=600)
    sampler.set_epoch(3)
    whole = list(sampler)
    sampler.set_epoch(3)
    batches = iter(sampler)
    begun = [next(batches) for _ in range(5)]
    state = json.loads(json.dumps(sampler.state_dict()))
    other = TokenBudgetBatchSampler(uneven_lengths(300), max_tokens=600)
    other.load_state_dict(state)
    assert begun + list(other) == whole
    sampler.set_epoch(4)
    assert list(other) == list(sampler) != whole  # the next pass is a whole one, of the next epoch
    other.load_state_dict(state)
    other.set_epoch(4)
    assert len(list(other)) == len(other)  # another epoch begins at its beginning
    with pytest.raises(PadfreeError, match="seed 0, this sampler 5"):
        TokenBudgetBatchSampler([1], max_tokens=2, seed=5).load_state_dict(state)
    with pytest.raises(PadfreeError, match="max_tokens 600, this sampler 700"):
        TokenBudgetBatchSampler(uneven_lengths(300), max_tokens=700).load_state_dict(state)
    with pytest.raises(PadfreeError, match="the saved order has lengths"):
        TokenBudgetBatchSampler(uneven_lengths(301), max_tokens=600).load_state_dict(state)


def test_a_pass_after_a_complete_one_is_of_the_next_epoch():
    """For loaders that never call set_epoch; a pass that was broken off begins again."""
    sampler, told = (TokenBudgetBatchSampler(uneven_lengths(300), max_tokens=600) for _ in range(2))
    first = list(sampler)
    next(iter(sampler))
    assert sampler.state_dict()["epoch"] == 1
    told.set_epoch(1)
    assert list(sampler) == list(told) != first


def test_window_must_hold_an_example():
    with pytest.raises(PadfreeError, match="window=0"):
        TokenBudgetBatchSampler([1], max_tokens=2, window=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_replicas": 2, "rank": 2}, "rank 2 of num_replicas 2"), ({"num_replicas": 4}, "3 examples can't give 4")],
)
def test_ranks_that_cannot_be_are_errors(options, message):
    with pytest.raises(PadfreeError, match=message):
        TokenBudgetBatchSampler([1, 2, 3], max_tokens=8, **options)


def test_loader_makes_rows_within_the_budget():
    examples = [{"input_ids": list(range(1, n + 1))} for n in uneven_lengths(100)]
    sampler = TokenBudgetBatchSampler([len(each["input_ids"]) for each in examples], max_tokens=600)
    rows = list(DataLoader(examples, batch_sampler=sampler, collate_fn=DataCollatorWithFlattening()))
    assert len(rows) == len(sampler)
    assert max(row["input_ids"].shape[1] for row in rows) <= 600
    assert sum(int((row["position_ids"] == 0).sum()) for row in rows) == 100


BOUNDARIES = ("position_ids", "seq_idx", "attention_mask", "seq_lengths")
