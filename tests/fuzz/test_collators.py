"""What collators make of good examples equals what lists of Python make of them; bad ones are a PadfreeError."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.fuzzing import assert_found, bounded, is_refusal, outcome
from padfree_patch import (
    DataCollatorForCompletionOnlyLM,
    DataCollatorForPreference,
    DataCollatorWithFlattening,
)
from padfree_patch.data import completions, flattening

pytestmark = pytest.mark.fuzz

RESPONSE, INSTRUCTION = [7, 8], [9]
ARRAYS = [list, tuple, np.array, torch.tensor, lambda x: np.array(x, np.uint8), lambda x: torch.tensor(x).int()]
ODD = (
    *(None, 3, 2.5, "text", b"ab", [], [None], ["a"], [1.5], [float("nan")], [True], [[1, 2], [3]], [[1], [2]], {1: 2}),
    *([2**63], [-(2**63) - 1], [1, 2, 3], object(), iter, torch.ones(2, 2), torch.tensor(1), torch.tensor([0.5])),
    *(torch.tensor([1.0]).bfloat16(), torch.tensor([1j]), np.array(["a"]), np.array([2**64 - 1], np.uint64)),
)


@dataclasses.dataclass(frozen=True)
class Case:
    features: list[Any]
    expected: list[tuple[list[int], list[int]]]
    """Tokens and labels of each sequence."""
    options: dict[str, Any]
    spoiled: bool


def tokens(low: int = 1, high: int = 9):
    return st.lists(st.integers(3, 40), min_size=low, max_size=high)


def array(draw, values: list[int]) -> Any:
    return draw(st.sampled_from(ARRAYS[:4] if min(values) < 0 else ARRAYS))(values)


def odd(draw) -> Any:
    """Draws one of `ODD`, but for `iter` an iterator, which is new each time: a used one would be empty."""
    value = draw(st.sampled_from(ODD))
    return iter([1]) if value is iter else value


def spoil(draw, features: list[Any]) -> bool:
    """Makes something wrong, or odd, of the examples in half of all cases; returns whether."""
    kind = draw(st.sampled_from(["no", "no", "field", "missing", "feature"]))
    at = draw(st.integers(0, len(features) - 1))
    name = draw(st.sampled_from(sorted(features[at])))
    if kind == "field":
        features[at][name] = odd(draw)
    elif kind == "missing":
        del features[at][name]
    elif kind == "feature":
        features[at] = odd(draw)
    return kind != "no"


@st.composite
def flat(draw) -> Case:
    has = draw(st.sets(st.sampled_from(["labels", "attention_mask", "completion_mask", "assistant_masks", "packed"])))
    features, expected = [], []
    for _ in range(draw(st.integers(1, 4))):
        parts = draw(st.lists(tokens(), min_size=1, max_size=3 if "packed" in has else 1))
        ids = list(itertools.chain(*parts))
        feature = {"input_ids": array(draw, ids)}
        labels = ids
        if "labels" in has:
            labels = [draw(st.sampled_from([each, -100])) for each in ids]
            feature["labels"] = array(draw, labels)
        for name in sorted(has & {"completion_mask", "assistant_masks"}):
            mask = [draw(st.integers(0, 1)) for _ in ids]
            labels = [label if each else -100 for label, each in zip(labels, mask)]
            feature[name] = draw(st.sampled_from([list, lambda x: torch.tensor(x, dtype=torch.bool)]))(mask)
        if "attention_mask" in has:
            feature["attention_mask"] = array(draw, [1] * len(ids))
        if "packed" in has:
            say = draw(st.sets(st.sampled_from(["seq_lengths", "position_ids", "seq_idx"]), min_size=1))
            lengths = [len(part) for part in parts]
            forms = {
                "seq_lengths": lengths,
                "position_ids": [i for length in lengths for i in range(length)],
                "seq_idx": [i for i, length in enumerate(lengths) for _ in range(length)],
            }
            feature |= {name: array(draw, forms[name]) for name in sorted(say)}
        features.append(feature)
        ends = list(itertools.accumulate(map(len, parts), initial=0))
        expected += [(ids[a:b], labels[a:b]) for a, b in itertools.pairwise(ends)]
    options = {
        "separator_id": draw(st.sampled_from([-100, 0])),
        "position_ids_start": draw(st.sampled_from([0, 5])),
        "pad_to_multiple_of": draw(st.sampled_from([None, None, 1, 8])),
        "return_flash_attn_kwargs": draw(st.booleans()),
        "return_seq_idx": draw(st.booleans()),
    }
    return Case(features, expected, options, spoil(draw, features))


def check_flat(case: Case) -> None:
    batch = outcome(lambda: DataCollatorWithFlattening(pad_token_id=1, **case.options)(case.features))
    if is_refusal(batch):
        assert case.spoiled, batch
        return
    assert_row(batch, case, separator=case.options["separator_id"])


def assert_row(batch: Any, case: Case, separator: int = -100) -> None:
    """Raises AssertionError unless a batch is what the case expects; of a spoiled one, unless it is whole in itself."""
    if isinstance(batch, Exception):
        raise AssertionError(f"{case} makes {batch!r}") from batch
    start, multiple = case.options.get("position_ids_start", 0), case.options.get("pad_to_multiple_of") or 1
    total = batch["input_ids"].shape[1]
    assert batch["input_ids"].shape == batch["labels"].shape == (1, total) and total % multiple == 0
    if case.spoiled:
        return
    lengths = [len(ids) for ids, _ in case.expected]
    padding = -sum(lengths) % multiple
    lengths += [padding] * bool(padding)
    labels = [[separator, *labels[1:]] for _, labels in case.expected] + [[-100] * padding]
    assert batch["input_ids"].tolist() == [list(itertools.chain(*(ids for ids, _ in case.expected))) + [1] * padding]
    assert batch["labels"].tolist() == [list(itertools.chain(*labels))]
    assert batch["position_ids"].tolist() == [[start + i for length in lengths for i in range(length)]]
    cumulated = list(itertools.accumulate(lengths, initial=0))
    for name, wanted in {
        "seq_idx": [[i for i, length in enumerate(lengths) for _ in range(length)]],
        "cu_seq_lens_q": cumulated,
        "cu_seq_lens_k": cumulated,
    }.items():
        if name in batch:
            found = batch[name].flatten() if name != "seq_idx" else batch[name]
            assert found.tolist() == wanted
    if "packed_sequences" in batch:
        assert batch["packed_sequences"].lengths == tuple(lengths)
        assert batch["packed_sequences"].padding == padding


@st.composite
def dialogues(draw) -> Case:
    turns = draw(st.booleans())
    features, expected = [], []
    for _ in range(draw(st.integers(1, 4))):
        ids, labels = [], []
        for _ in range(draw(st.integers(1, 3 if turns else 1))):
            prompt, answer = draw(tokens()), draw(tokens())
            prompt, answer = ([each for each in part if each not in (7, 8, 9)] or [5] for part in (prompt, answer))
            before = [*INSTRUCTION * turns, *prompt, *RESPONSE]
            ids += before + answer
            labels += [-100] * len(before) + answer
        features.append({"input_ids": array(draw, ids)})
        expected.append((ids, labels))
    options = {
        "instruction_template": INSTRUCTION if turns else None,
        "padding_free": draw(st.booleans()),
        "pad_to_multiple_of": draw(st.sampled_from([None, 8])),
    }
    return Case(features, expected, options, spoil(draw, features))


class Tokenizer:
    pad_token_id = 1
    padding_side = "right"


def check_dialogues(case: Case) -> None:
    collator = outcome(lambda: DataCollatorForCompletionOnlyLM(RESPONSE, tokenizer=Tokenizer(), **case.options))
    batch = outcome(lambda: collator(case.features))
    if is_refusal(batch):
        assert case.spoiled, batch
    elif case.options["padding_free"]:
        assert_row(batch, case)
    elif isinstance(batch, Exception):
        raise AssertionError(f"{case} makes {batch!r}") from batch
    elif not case.spoiled:
        for row, (ids, labels) in enumerate(case.expected):
            assert batch["input_ids"][row, batch["attention_mask"][row] == 1].tolist() == ids
            rest = batch["labels"].shape[1] - len(labels)
            assert batch["labels"][row].tolist() == labels + [-100] * rest


@st.composite
def pairs(draw) -> Case:
    has_prompt, ending = draw(st.booleans()), draw(st.sampled_from(["_ids", "_input_ids"]))
    features, answers = [], {"chosen": [], "rejected": []}
    for _ in range(draw(st.integers(1, 4))):
        prompt = draw(tokens()) if has_prompt else []
        feature = {f"prompt{ending}": array(draw, prompt)} if has_prompt else {}
        for name, expected in answers.items():
            answer = draw(tokens())
            feature[f"{name}{ending}"] = array(draw, answer)
            expected.append((prompt + answer, [-100] * len(prompt) + answer))
        features.append(feature)
    return Case(features, [*answers["chosen"], *answers["rejected"]], {}, spoil(draw, features))


def check_pairs(case: Case) -> None:
    batch = outcome(lambda: DataCollatorForPreference()(case.features))
    if is_refusal(batch):
        assert case.spoiled, batch
    else:
        assert_row(batch, case)


@bounded(250)
@given(flat())
def test_a_flattened_row_is_what_its_examples_say(case):
    check_flat(case)


@bounded(250)
@given(dialogues())
def test_only_completions_are_trained(case):
    check_dialogues(case)


@bounded(150)
@given(pairs())
def test_pairs_are_all_chosen_answers_and_then_all_rejected(case):
    check_pairs(case)


def test_a_first_label_that_is_kept_is_found(monkeypatch):
    monkeypatch.setattr(flattening, "ignore_first_labels", lambda labels, *_, **__: labels)
    for cases, check in ((flat(), check_flat), (pairs(), check_pairs)):
        assert_found(cases, check)


def test_masks_that_are_not_read_are_found(monkeypatch):
    monkeypatch.setattr(flattening, "label_masks", lambda features: [])
    assert_found(flat(), check_flat)


def test_a_completion_that_begins_too_early_is_found(monkeypatch):
    monkeypatch.setattr(completions, "whole_numbers", lambda ids, name: np.array(ids[:1]))
    assert_found(dialogues(), check_dialogues)
