"""How the fuzzers of `tests/fuzz` run, and what they share: outcomes that are compared, and a model of one small layer.

In `make test` each makes a few examples, the same ones every time. `nox -s fuzz` makes many more, at random.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from padfree_patch import PadfreeError
from padfree_patch.registry import registry
from padfree_patch.testing import tiny_model

ASKED_FOR = os.environ.get("PADFREE_FUZZ_EXAMPLES")
"""Examples per fuzzer, if `nox -s fuzz` runs them: random ones."""

VOCABULARY = 32


def bounded(examples: int, *, slower: int = 1, **options: Any) -> settings:
    """Returns settings with so many examples, always the same, unless the environment asks for others.

    Of a fuzzer that is `slower` than others it asks for that many times fewer.
    """
    return settings(
        max_examples=max(int(ASKED_FOR) // slower, 1) if ASKED_FOR else examples,
        derandomize=ASKED_FOR is None,
        database=None,
        deadline=None,  # which would depend on the machine's load
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        **options,
    )


def assert_found(cases: SearchStrategy, check: Callable[[Any], None], examples: int = 300) -> None:
    """Raises AssertionError unless a fuzzer's check fails on one of so many cases: the control, with a broken piece."""
    one_fault = settings(
        bounded(examples), max_examples=examples, derandomize=True, phases=[Phase.generate], report_multiple_bugs=False
    )

    @one_fault
    @given(cases)
    def fuzz(case):
        check(case)

    with pytest.raises(AssertionError):
        fuzz()


def small_llama(implementation: str = "sdpa") -> Any:
    """Makes the same Llama of one layer, 16 wide, on every call."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    patch = registry().get("llama")
    return tiny_model(patch, implementation, num_hidden_layers=1, vocab_size=VOCABULARY, **shape)


def outcome(function: Callable[[], Any]) -> Any:
    """Returns what a function returns, or the error that it raises. Warnings are not looked at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function()
        except Exception as error:
            return error


def same(found: Any, expected: Any) -> bool:
    """Whether two outcomes are the same: equal tensors, bit for bit, or an error that says the same."""
    if isinstance(found, Exception) or isinstance(expected, Exception):
        return type(found) is type(expected) and str(found) == str(expected)
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(torch.nan_to_num(one), torch.nan_to_num(other)) for one, other in pairs)


def is_refusal(found: Any) -> bool:
    return isinstance(found, PadfreeError)
