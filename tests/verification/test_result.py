"""Verification: every outcome has an error of its own, and only `apply` says that it put the model back."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

import padfree_patch
from padfree_patch import LeakError, PadfreeError, Verification

RIGHT = Verification("Tiny", logit_change=0.0, leaked_gradient=0.0, alone_error=1e-7, alone_tolerance=2e-5)
LEAKS = dataclasses.replace(RIGHT, logit_change=0.5, leaked_gradient=0.1, first_leak="model.layers.0.self_attn")
WRONG = dataclasses.replace(RIGHT, alone_error=0.5)
NO_LOGITS = Verification("Tiny", leaked_gradient=math.nan)
NO_GRADIENT = dataclasses.replace(RIGHT, leaked_gradient=math.nan)
SKIPPED = Verification("Tiny", skipped="parameter w is on the meta device")
EXPECTED = {
    "leaks": (LEAKS, LeakError, "does not isolate its examples", "Tiny: EXAMPLES MIX"),
    "wrong": (WRONG, LeakError, "isolates its examples, but does not give what each gives alone", "Tiny: WRONG RESULT"),
    "no logits": (NO_LOGITS, PadfreeError, "gives logits that are not finite", "look for NaN in the weights"),
    "no gradient": (NO_GRADIENT, PadfreeError, "gives gradients that are not finite", "look for NaN in the weights"),
    "skipped": (SKIPPED, PadfreeError, "was not verified", "parameter w is on the meta device"),
}
NOT_OK = pytest.mark.parametrize(("result", "kind", "problem", "report"), EXPECTED.values(), ids=EXPECTED)


@NOT_OK
def test_each_outcome_raises_its_own_error(result, kind, problem, report):
    with pytest.raises(PadfreeError) as caught:
        result.raise_if_leaking()
    assert type(caught.value) is kind
    assert str(caught.value).splitlines()[0] == f"Tiny {problem}"
    assert report in str(caught.value)


@NOT_OK
def test_raise_if_leaking_does_not_say_that_it_put_something_back(result, kind, problem, report):
    with pytest.raises(PadfreeError) as caught:
        result.raise_if_leaking()
    assert "put back" not in str(caught.value)


@pytest.mark.parametrize("outcome", [name for name in EXPECTED if name != "skipped"])  # for which apply only warns
def test_apply_says_what_it_found_and_that_it_put_the_model_back(llama, monkeypatch, outcome):
    result, kind, problem, report = EXPECTED[outcome]
    monkeypatch.setattr(padfree_patch.verification, "verify", lambda model: result)
    with pytest.raises(PadfreeError) as caught:
        padfree_patch.apply(llama)
    assert type(caught.value) is kind
    assert str(caught.value).splitlines()[0] == f"the patched model {problem}; it was put back as it was"
    assert report in str(caught.value)
    assert not padfree_patch.patching.is_applied(llama)


def test_right_result_raises_nothing():
    RIGHT.raise_if_leaking()
    dataclasses.replace(RIGHT, alone_error=math.nan, alone_refused="upstream fails").raise_if_leaking()


def test_weights_that_are_not_numbers_are_no_leak(llama):
    with torch.no_grad():
        llama.lm_head.weight.fill_(float("nan"))
    result = padfree_patch.verify(llama)
    assert not result
    with pytest.raises(PadfreeError, match="logits that are not finite") as caught:
        result.raise_if_leaking()
    assert not isinstance(caught.value, LeakError)
    assert "isolate" not in str(caught.value) and "MIX" not in str(caught.value)
    with pytest.warns(UserWarning, match="could not check its work: .*not finite"):
        padfree_patch.apply(llama)


def test_a_leak_that_the_logits_show_is_one_whatever_the_gradient():
    overflown = dataclasses.replace(LEAKS, leaked_gradient=math.inf)
    with pytest.raises(LeakError, match="EXAMPLES MIX"):
        overflown.raise_if_leaking()


@pytest.mark.parametrize("result", [RIGHT, *(each[0] for each in EXPECTED.values())], ids=["right", *EXPECTED])
def test_as_dict_survives_json_without_nan(result):
    text = json.dumps(result.as_dict(), allow_nan=False)
    assert json.loads(text)["ok"] is result.ok
    assert str(Verification.from_dict(json.loads(text))) == str(result)


def test_as_dict_turns_what_is_no_number_into_none():
    given = dataclasses.replace(LEAKS, alone_error=math.nan, alone_tolerance=math.inf).as_dict()
    assert given["alone_error"] is given["alone_tolerance"] is None
    assert (given["model"], given["logit_change"], given["skipped"]) == ("Tiny", 0.5, None)
