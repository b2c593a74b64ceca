"""The calls that hold no packed row, on which a patched model must give what the unpatched one gives, bit for bit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .models import examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Results = dict[str, "Tensor | str"]
"""By the name of the call: what it gives, or the error that upstream raises for it."""


def ordinary_results(model: PreTrainedModel) -> Results:
    """Returns what a model gives for the calls that hold no packed row; of a call that upstream refuses, the error."""
    short, long = examples((6, 10), vocab_size=model.config.vocab_size)
    pad = torch.zeros(1, 4, dtype=torch.int64)
    right, left = torch.cat([torch.cat([short, pad], 1), long]), torch.cat([torch.cat([pad, short], 1), long])
    right_mask = torch.tensor([[1] * 6 + [0] * 4, [1] * 10])
    left_mask = right_mask.flip(1)
    padded_left = {"input_ids": left, "attention_mask": left_mask, "position_ids": _positions(left_mask)}
    calls: dict[str, Callable[[], Tensor]] = {
        "no cache": lambda: model(input_ids=long, use_cache=False).logits,
        "positions": lambda: model(input_ids=long, position_ids=torch.arange(10).unsqueeze(0)).logits,
        "padded right": lambda: model(input_ids=right, attention_mask=right_mask, labels=right, use_cache=False).logits,
        "padded right, cached": lambda: model(input_ids=right, attention_mask=right_mask).logits,
        "padded left": lambda: model(**padded_left).logits,
        "cache": lambda: _continue(model, long),
        "second turn": lambda: _second_turn(model, padded_left),
        "generate": lambda: model.generate(
            left, attention_mask=left_mask, max_new_tokens=5, do_sample=False, pad_token_id=0
        ),
    }
    with torch.no_grad():
        return {"plain": model(input_ids=long).logits, **{name: _result_or_error(call) for name, call in calls.items()}}


def assert_identical(found: Results, expected: Results) -> None:
    """Raises AssertionError, naming the call, unless all results are bit-identical and all errors the same."""
    for name, value in expected.items():
        if isinstance(value, str):
            assert found[name] == value, f"{name}: unpatched {value}, patched {found[name]}"
            continue
        result = found[name]
        same = isinstance(result, Tensor) and torch.equal(result, value)
        assert same, f"{name}: not bit-identical to the unpatched model: {result}"


def _positions(mask: Tensor) -> Tensor:
    """Returns the positions that generate gives left-padded rows: padding has 1."""
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)


def cache_argument(model: PreTrainedModel) -> str:
    """Returns what a model's forward and its output call the cache: "cache" from 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _continue(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Runs all tokens except the last three, and then those with a cache."""
    name = cache_argument(model)
    cache = {name: model(input_ids=tokens[:, :7], use_cache=True)[name]}
    positions = torch.arange(7, 10).unsqueeze(0)
    return model(input_ids=tokens[:, 7:], position_ids=positions, **cache).logits


def _second_turn(model: PreTrainedModel, padded_left: Mapping[str, Tensor]) -> Tensor:
    """Runs a left-padded batch again, with the cache of the first run and a mask that covers both."""
    name = cache_argument(model)
    cache = {name: model(**padded_left, use_cache=True)[name]}
    mask = torch.cat([padded_left["attention_mask"]] * 2, 1)
    positions = _positions(mask)[:, padded_left["input_ids"].shape[1] :]
    return model(input_ids=padded_left["input_ids"], attention_mask=mask, position_ids=positions, **cache).logits


def _result_or_error(call: Callable[[], Tensor]) -> Tensor | str:
    try:
        return call()
    except Exception as error:  # upstream can't do everything in every version; patched it must fail in the same way
        return repr(error)
