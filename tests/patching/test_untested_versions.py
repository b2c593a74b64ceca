"""A transformers outside the tested range: a note in the log if the model was checked, a warning if not."""

from __future__ import annotations

import logging

import pytest

import padfree_patch
from padfree_patch import patching, verification

pytestmark = pytest.mark.versions


PASSED = padfree_patch.Verification(
    "Tiny", logit_change=0.0, leaked_gradient=0.0, alone_error=0.0, alone_tolerance=1e-5
)


@pytest.fixture(params=["4.20.0", "9.0"])
def untested(request, monkeypatch) -> str:
    running = padfree_patch.versions.Version(request.param)
    monkeypatch.setattr(patching.versions, "transformers_version", lambda: running)
    return request.param


def test_untested_version_is_a_note_in_the_log_once_verified(llama, untested, monkeypatch, caplog):
    monkeypatch.setattr(verification, "verify", lambda model: PASSED)
    caplog.set_level(logging.INFO, logger="padfree_patch")
    padfree_patch.apply(llama)  # a warning would be an error here
    assert f"this is {untested}; the check of the model itself passed" in caplog.text


def test_untested_version_warns_if_nothing_was_verified(llama, untested, caplog):
    caplog.set_level(logging.INFO, logger="padfree_patch")
    with pytest.warns(UserWarning, match=f"llama was tested on transformers .*, this is {untested}. Leave verify=True"):
        padfree_patch.apply(llama, verify=False)
    assert patching.is_applied(llama) and "was tested on" not in caplog.text


def test_untested_version_warns_if_the_check_was_skipped(llama, untested):
    with pytest.warns(UserWarning) as caught:
        padfree_patch.apply(llama.to("meta"))
    assert ["could not check" in str(each.message) for each in caught] == [True, False]
    assert f"this is {untested}" in str(caught[1].message)


def test_tested_version_says_nothing(llama, caplog):
    """The control."""
    caplog.set_level(logging.INFO, logger="padfree_patch")
    padfree_patch.apply(llama, verify=False)
    assert "was tested on" not in caplog.text
