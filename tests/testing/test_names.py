"""What third parties import for their own patches and tests is there, under the names that it has always had."""

from __future__ import annotations

import pytest

import padfree_patch
from padfree_patch import registry
from padfree_patch.testing import CHECKS, FAIL_UNPATCHED, conformance

OF_CONFORMANCE = [
    "CHECKS",
    "GRADIENT_TOLERANCE",
    "LENGTHS",
    "LOGIT_TOLERANCE",
    "Make",
    "alone_loss_and_gradients",
    "as_batch",
    "assert_gradients_close",
    "check_cost",
    "check_gradients",
    "check_isolation",
    "check_logits",
    "check_ordinary_calls",
    "check_router_losses",
    "check_rows",
    "check_two_forwards",
    "checkpointing",
    "largest",
    "logits_alone",
    "ordinary_results",
    "syncs_of",
]


@pytest.mark.parametrize("name", OF_CONFORMANCE)
def test_conformance_has_the_names_of_before_it_was_split(name):
    assert hasattr(conformance, name) and name in conformance.__all__


@pytest.mark.parametrize("name", padfree_patch.__all__)
def test_public_names_are_there(name):
    assert getattr(padfree_patch, name) is not None


def test_unknown_names_are_errors():
    """The control: the function that loads the callback late does not answer to everything."""
    with pytest.raises(AttributeError, match="has no attribute 'PaddedCallback'"):
        padfree_patch.PaddedCallback  # noqa: B018


def test_checks_that_must_fail_unpatched_are_among_the_checks():
    """All of them, except the two that an unpatched model passes."""
    rest = set(CHECKS) - set(FAIL_UNPATCHED)
    assert rest == {conformance.check_cost, conformance.check_ordinary_calls}
    assert len(FAIL_UNPATCHED) == len(CHECKS) - 2


def test_attention_call_is_the_class_that_patches_are_given():
    assert padfree_patch.AttentionCall is registry.AttentionCall
