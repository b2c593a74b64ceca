"""Losses of packed rows are the padded batch's: no label reaches across a boundary, and none is lost."""

from __future__ import annotations

import pytest
import torch

import padfree_patch
from helpers.any_decoder import maker
from padfree_patch.testing import conformance, examples, pack, pad

pytestmark = pytest.mark.versions


@pytest.mark.parametrize("kind", ["gpt2", "bart", "rwkv"])
def test_loss_is_the_padded_batchs(kind):
    """BART's decoder shifts no labels, so that the first of each example counts; GPT-2's head is an LMHeadModel."""
    make, texts = maker(kind), examples((5, 9, 12))
    padded = pad(texts)
    expected = make()(**padded).loss
    model = padfree_patch.apply(make())
    batch = pack(texts)
    found = model(**batch, labels=batch["input_ids"]).loss
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)


def test_labels_of_barts_decoder_are_not_shifted():
    """The control: with the first labels ignored, as other heads need it, the loss is another."""
    texts = examples((5, 9, 12))
    model = padfree_patch.apply(maker("bart")())
    batch = pack(texts)
    labels = batch["input_ids"].clone()
    kept = model(**batch, labels=labels).loss
    labels[batch["position_ids"] == 0] = -100
    assert abs(model(**batch, labels=labels).loss - kept) > 1e-3 > conformance.LOGIT_TOLERANCE
