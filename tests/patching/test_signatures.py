"""Promise 3: a patched forward takes what the unpatched one takes, however its parameters are written."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaModel

import padfree_patch
from helpers.models import skip_if_unavailable
from padfree_patch.registry import registry
from padfree_patch.testing import conformance, examples, pad, tiny_model

pytestmark = pytest.mark.versions


class TakesAnything(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class TakesAnythingTwice(TakesAnything):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class DecoderTakesAnything(LlamaModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class TakesTheRest(LlamaForCausalLM):
    def forward(self, input_ids=None, *args, **kwargs):
        return super().forward(input_ids, *args, **kwargs)


@pytest.mark.parametrize("kind", [TakesAnything, TakesAnythingTwice, TakesTheRest, DecoderTakesAnything])
def test_forward_that_names_no_arguments_takes_packed_rows_by_position_and_by_name(llama, batch, kind):
    """The names are those of the forward that it calls."""
    plain = kind(llama.config).eval()
    ids, positions, mask = batch["input_ids"], batch["position_ids"], torch.ones_like(batch["input_ids"])
    packed_calls = [((ids, mask, positions), {}), ((ids,), {"position_ids": positions}), ((), batch)]
    padded = pad(examples((4, 7)))
    with torch.no_grad():
        alone = torch.cat([plain(each)[0] for each in examples(conformance.LENGTHS)], dim=1)
        expected = plain(padded["input_ids"], padded["attention_mask"])[0]
        padfree_patch.apply(plain)
        for args, kwargs in packed_calls:
            torch.testing.assert_close(plain(*args, **kwargs)[0], alone)
        assert torch.equal(plain(padded["input_ids"], padded["attention_mask"])[0], expected)


def test_labels_at_boundaries_are_ignored_where_a_forward_names_no_arguments(llama, batch):
    plain = TakesAnything(llama.config).eval()
    labels = padfree_patch.DataCollatorWithFlattening(return_tensors="pt")(
        [{"input_ids": each[0].tolist()} for each in examples(conformance.LENGTHS)]
    )["labels"]
    model = padfree_patch.apply(plain)
    expected = model(**batch, labels=labels).loss
    torch.testing.assert_close(
        model(batch["input_ids"], position_ids=batch["position_ids"], labels=batch["input_ids"]).loss, expected
    )


@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "stablelm"])
def test_what_upstreams_decorators_take_is_not_refused(name):
    """From 4.52 on they take return_dict, which the function under them does not name."""
    skip_if_unavailable(lambda: tiny_model(registry().get(name), "sdpa", num_hidden_layers=1))
    model = tiny_model(registry().get(name), "sdpa", num_hidden_layers=1)
    batch = {each: value for each, value in pad(examples((4, 7))).items() if each != "labels"}
    with torch.no_grad():
        expected = [each(**batch, return_dict=False)[0] for each in (model, model.base_model)]
        padfree_patch.apply(model)
        found = [each(**batch, return_dict=False)[0] for each in (model, model.base_model)]
    assert all(map(torch.equal, found, expected))


def test_wrong_calls_raise_upstreams_error_once(llama):
    """A call that can't be bound is upstream's to refuse; a decorator of theirs may well take it."""
    ids = torch.arange(3, 9).unsqueeze(0)
    errors = []
    for apply in (lambda model: model, padfree_patch.apply):
        model = apply(llama)
        for args, kwargs in [
            ((ids,) * 40, {}),
            ((ids,), {"input_ids": ids, "attention_mask": ids}),
            ((ids[0], ids), {}),
            ((ids,), {"position_ids": [[0, 1, 2, 0, 1, 2]]}),
        ]:
            with pytest.raises(Exception) as error:
                model.forward(*args, **kwargs)
            errors.append(repr(error.value))
    assert errors[:4] == errors[4:]
