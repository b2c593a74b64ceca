"""Rows filled by best-fit decreasing, batches by a token budget: nothing lost, nothing over, little empty."""

from __future__ import annotations

import json
import time
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from padfree_patch import (
    DataCollatorWithFlattening,
    PadfreeError,
    TokenBudgetBatchSampler,
    estimate,
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


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3, None], "lengths must be whole numbers, found None at place 1"),
        ([3, float("nan")], "lengths must be whole numbers, found nan at place 1"),
        ([3, 1.5], "lengths must be whole numbers, found 1.5 at place 1"),
        ([True, 1], "lengths must be whole numbers, found True at place 0"),
        (torch.tensor([1, 2**24 + 1.5], dtype=torch.float64), "lengths must be whole numbers, found 16777217.5 at pl"),
        ([[1, 2], [3]], r"lengths must be whole numbers, found \[1, 2\] at place 0"),
        ([2**63], "lengths must be whole numbers, found 9223372036854775808 at place 0"),
        ("123", "lengths must be a list of whole numbers, found '123'"),
        (None, "lengths must be a list of whole numbers, found None"),
        (7, "lengths must be a list of whole numbers, found 7"),
    ],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda lengths: plan_packing(lengths, 8),
        lambda lengths: TokenBudgetBatchSampler(lengths, max_tokens=8),
        lambda lengths: estimate(lengths, batch_size=1),
    ],
    ids=["plan", "sampler", "estimate"],
)
def test_lengths_that_are_no_whole_numbers_are_errors(use, lengths, message):
    with pytest.raises(PadfreeError, match=message):
        use(lengths)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: plan_packing([1], None), "max_length must be a whole number, 1 or more, found None"),
        (lambda: plan_packing([1], 2.5), "max_length must be a whole number, 1 or more, found 2.5"),
        (lambda: plan_packing([1], 2).steps(0), "batch_size must be a whole number, 1 or more, found 0"),
        (lambda: TokenBudgetBatchSampler([1], max_tokens=-1), "max_tokens must be a whole number, 1 or more"),
        (lambda: TokenBudgetBatchSampler([1], max_tokens=2, seed=-1), "seed must be a whole number, 0 or more"),
        (lambda: TokenBudgetBatchSampler([1], max_tokens=2, num_replicas=0), "num_replicas must be a whole number, 1"),
        (lambda: TokenBudgetBatchSampler([1], max_tokens=2, rank="0"), "rank must be a whole number, found '0'"),
        (lambda: TokenBudgetBatchSampler([1], max_tokens=2).set_epoch(None), "epoch must be a whole number, 0 or more"),
        (lambda: estimate([1], batch_size=None), "batch_size must be a whole number, 1 or more, found None"),
        (lambda: estimate([1], batch_size=1, seed=-1), "seed must be a whole number, 0 or more, found -1"),
    ],
)
def test_arguments_that_are_no_whole_numbers_are_errors(use, message):
    with pytest.raises(PadfreeError, match=message):
        use()


def test_whole_floats_and_large_seeds_are_numbers():
    assert plan_packing(np.array([3.0, 5.0]), 8.0).rows == [[1, 0]]
    assert list(TokenBudgetBatchSampler([1], max_tokens=2, seed=2**63 + 1)) == [[0]]


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


@pytest.mark.parametrize("saved", ["after the last batch", "after the pass"])
def test_a_state_at_the_end_of_an_epoch_resumes_with_the_next(saved):
    """Whoever calls set_epoch with the epoch that is done gets what is left of it: nothing."""
    sampler, other, told = (TokenBudgetBatchSampler(uneven_lengths(300), max_tokens=600) for _ in range(3))
    batches = iter(sampler)
    for _ in range(len(sampler)):
        next(batches)
    if saved == "after the pass":
        assert next(batches, None) is None
    state = sampler.state_dict()
    other.load_state_dict(state)
    told.set_epoch(1)
    assert list(other) == list(told)
    other.load_state_dict(state)
    other.set_epoch(0)
    assert list(other) == []
    told.set_epoch(2)
    other.load_state_dict(state)
    assert [list(other), list(other)][1] == list(told)  # a loop without set_epoch loses no epoch


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batches": -1}, "batches must be a whole number, 0 or more, found -1"),
        ({"batches": 10**6}, "the saved state has yielded 1000000 batches of epoch 0, which has"),
        ({"epoch": None}, "epoch must be a whole number, 0 or more, found None"),
    ],
)
def test_states_that_cannot_be_are_errors(changed, message):
    sampler = TokenBudgetBatchSampler([1, 2, 3], max_tokens=4)
    before = sampler.state_dict()
    with pytest.raises(PadfreeError, match=message):
        sampler.load_state_dict({**before, **changed})
    for nothing in (None, {}, 7):
        with pytest.raises(PadfreeError, match="a sampler's state has epoch and batches, found"):
            sampler.load_state_dict(nothing)
    assert sampler.state_dict() == before


def test_many_replicas_are_planned_quickly():
    """8,001 batches that cannot be divided, for 64 replicas."""
    sampler = TokenBudgetBatchSampler([5] * 8001, max_tokens=5, num_replicas=64)
    start = time.perf_counter()
    assert len(sampler) == 8064
    assert time.perf_counter() - start < 1  # 2 s and more when each of 63 batches was looked for among all


def test_a_pass_after_a_complete_one_is_of_the_next_epoch():
    """For loaders that never call set_epoch; a pass that was broken off begins again."""
    sampler, told = (TokenBudgetBatchSampler(uneven_lengths(300), max_tokens=600) for _ in range(2))
    first = list(sampler)
    next(iter(sampler))
    assert sampler.state_dict()["epoch"] == 1
    told.set_epoch(1)
    assert list(sampler) == list(told) != first


def test_whoever_takes_as_many_batches_as_there_are_gets_the_next_epoch_too():
    """As Trainers from 4.46 on, which never come back for more. Epochs of a small window differ in their batches."""
    sampler, told = (TokenBudgetBatchSampler(uneven_lengths(300), max_tokens=600, window=20) for _ in range(2))
    counts = set()
    for epoch in range(4):
        told.set_epoch(epoch)
        assert len(sampler) == len(told)
        counts.add(len(sampler))
        batches = iter(sampler)
        assert [next(batches) for _ in range(len(sampler))] == list(told)
    assert len(counts) > 1  # the control: another epoch's number would be another one


def test_window_must_hold_an_example():
    with pytest.raises(PadfreeError, match="window must be a whole number, 1 or more, found 0"):
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
