"""Labels of the tokens whose logits are kept, as ms-swift gives them, cross no boundary either."""

from __future__ import annotations

import inspect

import pytest
import torch

from padfree_patch import PadfreeError, apply
from padfree_patch.testing import examples, pack

pytestmark = pytest.mark.versions

LENGTHS = (5, 4, 6)


@pytest.fixture
def keeps(llama):
    """The argument by which a head is told whose logits to keep."""
    names = inspect.signature(llama.forward).parameters
    found = next((name for name in ("logits_to_keep", "num_logits_to_keep") if name in names), None)
    if found is None:
        pytest.skip("heads of this version keep all logits")
    return found


def loss_alone(model, labelled):
    """The mean over the tokens that are labelled, by their place in the row, but for each example's first."""
    total, count, begin = 0.0, 0, 0
    for ids in examples(LENGTHS):
        labels = ids.masked_fill(~labelled[begin : begin + ids.shape[1]], -100)
        begin += ids.shape[1]
        predicted = int((labels[:, 1:] != -100).sum())
        total, count = total + model(input_ids=ids, labels=labels).loss * predicted, count + predicted
    return total / count


def test_kept_labels_are_ignored_where_they_follow_the_end_of_an_example(llama, keeps):
    labelled = torch.ones(15, dtype=torch.bool)
    labelled[:2] = labelled[10] = False
    batch = pack(examples(LENGTHS))
    with torch.no_grad():
        expected = loss_alone(llama, labelled)
        apply(llama)
        suffix = batch["input_ids"].masked_fill(~labelled, -100)[:, -14:]
        torch.testing.assert_close(llama(**batch, labels=suffix, **{keeps: 14}).loss, expected)
        if keeps == "logits_to_keep":  # ms-swift's mask: what predicts a labelled token, and the last one
            mask = torch.cat([labelled[1:], torch.ones(1, dtype=torch.bool)])
            kept = torch.nn.functional.pad(batch["input_ids"][:, labelled], (1, 0), value=-100)
            torch.testing.assert_close(llama(**batch, labels=kept, logits_to_keep=mask).loss, expected)
            crossing = kept.clone()
            crossing[0, 1] = 1  # the control: a label inside of an example counts
            assert abs(llama(**batch, labels=crossing, logits_to_keep=mask).loss - expected) > 1e-3


def test_labels_of_other_tokens_than_those_kept_are_an_error(llama, keeps):
    apply(llama)
    batch = pack(examples(LENGTHS))
    with pytest.raises(PadfreeError, match=r"labels have shape \(1, 7\), the tokens \(1, 15\)"):
        llama(**batch, labels=batch["input_ids"][:, -7:], **{keeps: 8})
