"""Fixtures of the tests for models without a patch."""

from __future__ import annotations

import pytest

from helpers.any_decoder import CONFIGS
from padfree_patch.registry import registry


@pytest.fixture(autouse=True)
def _no_patches(monkeypatch):
    """Makes the registry forget the patches of these kinds, which others may not have."""
    known = registry().get
    monkeypatch.setattr(registry(), "get", lambda model_type: None if model_type in CONFIGS else known(model_type))
