"""Every test here begins without the seams of earlier ones."""

from __future__ import annotations

import gc

import pytest

from padfree_patch.wrapping import opt_in, seam


@pytest.fixture(autouse=True)
def _clean_start():
    """Takes out the seams of models that earlier tests have left behind as garbage."""
    gc.collect()
    opt_in.living.clear()
    opt_in.remove_unused_seams()
    assert not seam.installed
