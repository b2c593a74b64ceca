"""What no way can serve is refused by name, with what was found, and is exactly as it was."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import padfree_patch
from helpers.any_decoder import with_weights
from helpers.models import assert_exact
from helpers.snapshots import snapshot
from padfree_patch import PadfreeError, versions
from padfree_patch.registry import registry
from padfree_patch.testing import conformance, examples, pack, tiny_model

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("clean_start")]

_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 97,
}


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**_SMALL))


def t5():
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=97)
    return transformers.T5ForConditionalGeneration(config)


class OwnMasks(transformers.PreTrainedModel):
    """Remote code that makes the mask of the row itself, and hands it to nobody who could be asked."""

    config_class = transformers.GPT2Config

    def __init__(self, prefix=0):
        super().__init__(transformers.GPT2Config(n_embd=8, vocab_size=97))
        self.embed, self.head, self.prefix = nn.Embedding(97, 8), nn.Linear(8, 97), prefix
        self.mixing = Mixing()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, attention_mask=None, position_ids=None):
        hidden = self.embed(input_ids)
        seen = torch.ones(2 * [input_ids.shape[1]]).tril()
        seen[:, : self.prefix] = 1
        return {"logits": self.head(self.mixing(hidden, seen))}


class Mixing(nn.Module):
    def forward(self, hidden, seen):
        scores = (hidden @ hidden.transpose(1, 2)).masked_fill(seen == 0, -1e9)
        return hidden + scores.softmax(-1) @ hidden


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (bert, r"BertForMaskedLM \(model type 'bert'\) is not causal: alone and unpatched, an example's first tokens"),
        (
            t5,
            r"T5ForConditionalGeneration \(model type 't5'\) is an encoder-decoder \(is_encoder_decoder of its config",
        ),
        (lambda: OwnMasks(prefix=4), r"OwnMasks .* is not causal: alone and unpatched"),
    ],
)
def test_what_is_not_causal_is_named(make, says):
    model = with_weights(make)
    before = snapshot(model)
    with pytest.raises(PadfreeError, match=says):
        padfree_patch.apply(model)
    assert snapshot(model) == before


class Unreachable(OwnMasks):
    """Mixes in its own forward, in no module that could be run on each sequence."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None):
        mixed = self.embed(input_ids).cumsum(1)
        return {"logits": self.head(mixed)}


def test_what_mixes_in_no_module_is_refused_with_what_was_tried():
    model = with_weights(Unreachable)
    before = snapshot(model)
    with pytest.raises(PadfreeError, match=r"Unreachable: no way was found.*put back as it was. Tried:") as caught:
        padfree_patch.apply(model)
    assert "EXAMPLES MIX" in str(caught.value)
    assert snapshot(model) == before


def test_module_with_a_mask_of_its_own_is_exact_or_refused():
    make = lambda: with_weights(OwnMasks)  # noqa: E731
    model, texts = make(), examples((9, 8))
    before = snapshot(model)
    try:
        padfree_patch.apply(model)
    except PadfreeError as error:
        assert "mixing" in str(error) and snapshot(model) == before
        return
    with torch.no_grad():
        alone = torch.cat([make()(each)["logits"] for each in texts], dim=1)
        found = model(**pack(texts))["logits"]
    assert conformance.largest(found - alone) < conformance.LOGIT_TOLERANCE * conformance.largest(alone)


class SeeingConfig(transformers.PretrainedConfig):
    model_type = "seeing"


class Seeing(transformers.PreTrainedModel):
    """As a model that sees has its language model inside."""

    config_class = SeeingConfig

    def __init__(self, language_model):
        super().__init__(SeeingConfig())
        self.vision, self.language_model = nn.Linear(2, 2), language_model

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, pixel_values=None):
        return self.language_model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)


def test_language_model_inside_is_found():
    make = lambda: tiny_model(registry().get("llama"), "sdpa")  # noqa: E731
    texts = examples((5, 9))
    alone = conformance.logits_alone(make, texts)
    if versions.transformers("<4.48"):  # here it is not found yet, and the error says what to do
        with pytest.raises(
            PadfreeError, match=r"apply\(model\.language_model\) patches the LlamaForCausalLM in it alone"
        ):
            padfree_patch.apply(Seeing(make()))
        return
    model = padfree_patch.apply(Seeing(make()))
    assert_exact(model, pack(texts), alone)
    with pytest.raises(PadfreeError, match="Seeing: a packed row with pixel_values: how images come into its text is"):
        model(**pack(texts), pixel_values=torch.ones(1, 2))
