"""What several files here ask for."""

from __future__ import annotations

import pytest

from helpers.labelled import FORMS
from padfree_patch.seams import labelled


@pytest.fixture(params=FORMS)
def logits(request, monkeypatch):
    """Either form of labelled logits; chunks have fewer rows than there are labels."""
    monkeypatch.setattr(labelled, "CHUNK", 4)
    return request.param
