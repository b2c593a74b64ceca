"""What the tests of `apply` and `restore` share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _clean_start(clean_start):
    """Snapshots must not see what models of earlier tests have left."""
