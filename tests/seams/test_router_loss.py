"""The auxiliary loss of mixtures of experts is over real tokens, in rows that a collator has lengthened too."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch

from helpers.models import skip_if_unavailable
from helpers.training import padding
from padfree_patch import (
    DataCollatorForCompletionOnlyLM,
    DataCollatorWithFlattening,
    PackedSequences,
    PadfreeError,
    apply,
)
from padfree_patch.registry import registry
from padfree_patch.testing import SyncCounter, tiny_model

pytestmark = pytest.mark.versions

TEXTS = [{"input_ids": [7, 8, *range(10, 10 + n)]} for n in (9, 4, 6)]


@pytest.fixture(params=["mixtral", "qwen2_moe", "dbrx"])
def model(request):
    def make():
        return tiny_model(registry().get(request.param), "sdpa", output_router_logits=True)

    skip_if_unavailable(make)
    found = make()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # so that the router prefers some experts
        for parameter in found.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    code = sys.modules[type(found).__module__]
    if "attention_mask" not in inspect.signature(code.load_balancing_loss_func).parameters:
        pytest.skip("upstream's padded batch counts its padding too")
    return found


def losses(model, batch):
    with torch.no_grad():
        found = model(**batch)
    return torch.stack([found.aux_loss, found.loss])


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True}, {"return_position_ids": False}])
def test_padding_at_the_end_of_a_row_is_not_counted(model, options):
    expected = losses(model, padding(TEXTS))
    apply(model)
    if options.get("return_position_ids") is False:
        options = {**options, "return_flash_attn_kwargs": True}
    batch = DataCollatorWithFlattening(pad_to_multiple_of=64, **options)(TEXTS)
    torch.testing.assert_close(losses(model, batch), expected, rtol=1e-4, atol=1e-5)
    batch["packed_sequences"] = PackedSequences.from_lengths(batch["packed_sequences"].lengths)  # the control
    assert abs(losses(model, batch)[0] - expected[0]) > 1e-3


def test_padding_of_a_completions_row_is_not_counted(model):
    options = {"padding_free": True}
    collators = [DataCollatorForCompletionOnlyLM([7, 8], pad_to_multiple_of=each, **options) for each in (None, 64)]
    apply(model)
    short, long = (losses(model, collator(TEXTS)) for collator in collators)
    torch.testing.assert_close(long, short, rtol=1e-4, atol=1e-5)


def test_knowing_the_padding_costs_no_sync(llama):
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, pad_to_multiple_of=64)(TEXTS)
    apply(llama)
    with SyncCounter() as syncs:
        llama(**batch)
    assert syncs.total == 0


def test_padding_is_the_last_sequence_and_goes_along():
    sequences = PackedSequences.from_lengths([2, 3], padding=3)
    assert sequences.padding == sequences.to("cpu").padding == 3
    assert PackedSequences.from_lengths([2, 3]).padding == 0
    with pytest.raises(PadfreeError, match="padding is 2 tokens, but the last sequence has 3"):
        PackedSequences.from_lengths([2, 3], padding=2)
