"""Every backend refuses tensors whose shapes contradict each other, before a kernel sees them."""

from __future__ import annotations

import pytest
import torch

from padfree_patch import PackedSequences, PadfreeError
from padfree_patch.attention import BACKENDS

SEQUENCES = PackedSequences.from_lengths((2, 3))


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((5, 3, 8), (5, 2, 8), (5, 2, 8), r"a multiple of them in q; found q \(5, 3, 8\), k \(5, 2, 8\)"),
        ((5, 2, 8), (5, 4, 8), (5, 4, 8), "a multiple of them in q"),
        ((5, 4, 8), (5, 2, 8), (5, 1, 8), r"as many heads in k as in v.*v \(5, 1, 8\)"),
        ((5, 4, 8), (5, 0, 8), (5, 0, 8), "a multiple of them in q"),
        ((5, 4, 8), (5, 2, 4), (5, 2, 4), "q and k of one head size"),
        ((5, 4, 8), (4, 2, 8), (4, 2, 8), "attention over 5 tokens takes as many in q, k and v"),
        ((6, 4, 8), (6, 4, 8), (6, 4, 8), "attention over 5 tokens takes as many"),
        ((1, 5, 4, 8), (1, 5, 2, 8), (1, 5, 2, 8), r"q, k and v as \(tokens, heads, head size\)"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.NAME)
def test_shapes_that_contradict_each_other_are_refused(backend, q, k, v, message):
    with pytest.raises(PadfreeError, match=message):
        backend.attend(torch.zeros(q), torch.zeros(k), torch.zeros(v), SEQUENCES, scale=1.0)
