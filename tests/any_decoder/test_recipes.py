"""How a builder masks one sequence is worked out once, not for every batch."""

from __future__ import annotations

import pytest
import torch

import padfree_patch
from helpers.any_decoder import maker
from padfree_patch.any_decoder import builders
from padfree_patch.any_decoder.noted_mask import noted_mask, number_of, recipes
from padfree_patch.batch.packed_batch import PackedBatch
from padfree_patch.batch.sequences import PackedSequences
from padfree_patch.testing import examples, pack
from padfree_patch.wrapping.call import Call

pytestmark = pytest.mark.versions


def test_batches_of_other_lengths_need_no_other_recipes():
    """Upstream's builders are given the shape of the row until 4.52, and some later."""
    model = padfree_patch.apply(maker("bart")())
    model(**pack(examples((5, 4))))
    before = len(recipes)
    for length in range(6, 12):
        model(**pack(examples((length, 4))))
    assert len(recipes) == before


def built(attention_mask, input_shape, reach):
    position = torch.arange(input_shape[1])
    distance = position[:, None] - position
    return ((distance >= 0) & (distance < reach))[None, None]


def number(tokens, reach):
    """Returns the number of the recipe for a call of a builder on a row of so many tokens."""
    sequences = PackedSequences.from_lengths([4, tokens - 4])
    mask = noted_mask(PackedBatch(sequences, sequences.position_ids()[None]))
    return number_of(builders.answer(Call(built, (mask, (1, tokens), reach), {})))


def test_a_recipe_depends_on_what_decides_and_not_on_the_row():
    assert number(9, reach=5) == number(12, reach=5)
    assert number(9, reach=5) != number(9, reach=6)  # the control
