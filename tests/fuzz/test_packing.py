"""Plans, samplers, packed data sets and the way back: no token is lost or comes twice, whatever the lengths."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.fuzzing import assert_found, bounded, is_refusal, outcome
from padfree_patch import PackedSequences, TokenBudgetBatchSampler, last_tokens, pack_dataset, plan_packing, unpack
from padfree_patch.data import row_writer, samplers

pytestmark = pytest.mark.fuzz

ODD = (None, 1.5, float("nan"), float("inf"), -1, 0, "3", [2], 2**63, 10**30)


@st.composite
def plans(draw) -> tuple[list[Any], Any]:
    """Makes lengths and the most of a row; one of them odd in a third of all cases."""
    lengths: list[Any] = draw(st.lists(st.integers(1, 12), min_size=1, max_size=30))
    most: Any = draw(st.integers(12, 30))
    odd = draw(st.sampled_from(["no", "no", "no", "no", "length", "most"]))
    if odd == "length":
        lengths[draw(st.integers(0, len(lengths) - 1))] = draw(st.sampled_from(ODD))
    elif odd == "most":
        most = draw(st.sampled_from(ODD))
    return lengths, most


def is_right(lengths: list[Any], most: Any) -> bool:
    return all(type(each) is int and each > 0 for each in [*lengths, most]) and max(lengths) <= most


def check_plan(case: tuple[list[Any], Any]) -> None:
    lengths, most = case
    plan = outcome(lambda: plan_packing(lengths, most))
    if not is_right(lengths, most) or is_refusal(plan):
        assert is_refusal(plan) and (not is_right(lengths, most) or most > 2**53), plan
        return
    assert sorted(itertools.chain(*plan.rows)) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in plan.rows]
    assert max(filled) <= most
    assert sum(sorted(filled)[:2]) > most or len(filled) == 1  # or the two would share a row
    assert plan.waste == pytest.approx(1 - sum(filled) / (most * len(filled)))


@st.composite
def passes(draw) -> dict[str, Any]:
    lengths, most = draw(plans())
    odd = draw(st.sampled_from(["no", "no", "no", "seed", "window", "num_replicas"]))
    options: dict[str, Any] = {
        "max_tokens": most,
        "seed": draw(st.integers(0, 3)),
        "window": draw(st.integers(1, 40)),
        "num_replicas": draw(st.integers(1, 5)),
    }
    if odd != "no":
        options[odd] = draw(st.sampled_from(ODD))
    return {"lengths": lengths, **options, "stop": draw(st.integers(0, 40)), "epoch": draw(st.integers(0, 3))}


def check_sampler(case: dict[str, Any]) -> None:
    options = {name: value for name, value in case.items() if name not in ("stop", "epoch")}
    lengths, replicas = options["lengths"], options["num_replicas"]
    sampler = outcome(lambda: TokenBudgetBatchSampler(**options))
    right = is_right(lengths, options["max_tokens"]) and is_right([replicas, options["window"]], 10**30)
    right = right and type(options["seed"]) is int and options["seed"] >= 0 and replicas <= len(lengths)
    if not right or is_refusal(sampler):
        is_huge = max(options[name] for name in ("max_tokens", "window", "seed")) > 2**53 if right else False
        assert is_refusal(sampler) and (not right or is_huge), sampler
        return
    sampler.set_epoch(case["epoch"])
    batches = list(sampler)
    assert len(batches) % replicas == 0
    assert max(sum(lengths[i] for i in batch) for batch in batches) <= options["max_tokens"]
    seen = sorted(itertools.chain(*batches))
    assert sorted(set(seen)) == list(range(len(lengths)))
    assert len(seen) == len(lengths) or all(
        len(batch) == 1 for batch in batches
    )  # one comes again only if none divides
    ranks = [TokenBudgetBatchSampler(**options, rank=rank) for rank in range(replicas)]
    for rank, each in enumerate(ranks):
        each.set_epoch(case["epoch"])
        assert len(each) == len(batches) // replicas
        assert list(each) == batches[rank::replicas]
    check_resumed(options, case["epoch"], batches, min(case["stop"], len(batches)))


def check_resumed(options: dict[str, Any], epoch: int, batches: list[list[int]], stop: int) -> None:
    """Raises AssertionError unless a sampler goes on where another one stopped."""
    first, second = (TokenBudgetBatchSampler(**options) for _ in range(2))
    first.set_epoch(epoch)
    begun = list(itertools.islice(first, stop))
    second.load_state_dict(first.state_dict())
    assert begun == batches[:stop]
    if stop < len(batches):
        assert list(second) == batches[stop:]
    else:  # the epoch was complete
        first.set_epoch(epoch + 1)
        assert list(second) == list(first)


@st.composite
def tables(draw) -> dict[str, Any]:
    examples = draw(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=14), min_size=1, max_size=12))
    columns: dict[str, list[Any]] = {"input_ids": examples}
    if draw(st.booleans()):
        columns["labels"] = [[-each for each in example] for example in examples]
    if draw(st.booleans()):
        columns["completion_mask"] = [[draw(st.integers(0, 1)) for _ in example] for example in examples]
    if draw(st.booleans()):
        columns["text"] = ["some"] * len(examples)
    odd = draw(st.sampled_from(["no", "no", "no", "empty", "null", "longer", "padded"]))
    at = draw(st.integers(0, len(examples) - 1))
    if odd == "empty":
        columns["input_ids"][at] = []
    elif odd == "null":
        columns["input_ids"][at] = [None]
    elif odd == "longer":
        columns["labels"] = [[*example, 1] if i == at else example for i, example in enumerate(examples)]
    elif odd == "padded":
        columns["attention_mask"] = [[1 - (i == at)] * len(example) for i, example in enumerate(examples)]
    order = draw(st.permutations(range(len(examples)))) if draw(st.booleans()) else None
    too_long = draw(st.sampled_from(["error", "cut", "split", "drop"]))
    return {"columns": columns, "order": order, "odd": odd != "no", "most": draw(st.integers(4, 20)), "long": too_long}


def check_table(case: dict[str, Any]) -> None:
    columns, order, most, long = (case[name] for name in ("columns", "order", "most", "long"))
    dataset = datasets.Dataset.from_dict(columns)
    dataset = dataset if order is None else dataset.select(order)
    packed = outcome(lambda: pack_dataset(dataset, most, too_long=long))
    longest = max(map(len, columns["input_ids"]))
    nothing_left = long == "drop" and min(map(len, columns["input_ids"])) > most
    if case["odd"] or (long == "error" and longest > most) or nothing_left:
        assert is_refusal(packed), packed
        return
    found = sorted(found_examples(packed, most))
    assert found == sorted(expected_examples(columns, most, long))


def found_examples(packed: Any, most: int) -> Any:
    """Yields tokens and labels of every example of packed rows, and checks that all columns say the same boundaries."""
    for row in packed:
        lengths = row["seq_lengths"]
        assert sum(lengths) == len(row["input_ids"]) <= most
        sequences = PackedSequences.from_lengths(lengths)
        assert PackedSequences.from_position_ids(torch.tensor(row["position_ids"])) == sequences
        assert PackedSequences.from_attention_mask(torch.tensor(row["attention_mask"])) == sequences
        assert row["seq_idx"] == [each - 1 for each in row["attention_mask"]]
        tokens, labels = (torch.tensor(row.get(name, row["input_ids"])) for name in ("input_ids", "labels"))
        assert last_tokens(tokens, sequences).tolist() == [part[-1] for part in unpack(tokens, sequences)]
        for ids, of_them in zip(unpack(tokens, sequences), unpack(labels, sequences)):
            yield ids.tolist(), of_them.tolist()


def expected_examples(columns: dict[str, list[Any]], most: int, long: str) -> Any:
    """Yields what the rows must hold, in some order."""
    for i, ids in enumerate(columns["input_ids"]):
        labels = columns.get("labels", columns["input_ids"])[i]
        mask = columns.get("completion_mask", [[1] * len(ids)] * (i + 1))[i]
        labels = [label if each else -100 for label, each in zip(labels, mask)]
        starts = range(0, len(ids) if long == "split" else 1, most)
        if long != "drop" or len(ids) <= most:
            yield from ((ids[a : a + most], labels[a : a + most]) for a in starts)


@bounded(150)
@given(plans())
def test_a_plan_holds_every_example_once(case):
    check_plan(case)


@bounded(120)
@given(passes())
def test_a_sampler_yields_every_example_once_and_goes_on_where_it_stopped(case):
    check_sampler(case)


@bounded(100)
@given(tables())
def test_a_packed_data_set_holds_every_token(case):
    logging.getLogger("padfree_patch.dataset").setLevel(logging.ERROR)
    check_table(case)


def test_a_label_that_should_be_ignored_is_found(monkeypatch):
    monkeypatch.setattr(row_writer, "IGNORED_LABEL", 0)
    assert_found(tables(), check_table)


def test_rows_that_are_too_full_are_found(monkeypatch):
    fill = samplers.best_fit_decreasing
    monkeypatch.setattr(samplers, "best_fit_decreasing", lambda lengths, most: fill(lengths, most + 1))
    assert_found(passes(), check_sampler)
