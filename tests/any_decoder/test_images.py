"""Language models inside models that see: found by themselves, and rows with images exact or refused by name."""

from __future__ import annotations

import pytest
import torch
import transformers

import padfree_patch
from helpers.any_decoder import CONFIGS, with_weights
from padfree_patch import PadfreeError
from padfree_patch.testing import conformance, examples, pack
from padfree_patch.wrapping.opt_in import OptIn

pytestmark = pytest.mark.skipif(
    tuple(int(n) for n in transformers.__version__.split(".")[:2]) < (5, 20), reason="configs are those of 5.24"
)

_TEXT = {**CONFIGS["qwen3"], "vocab_size": 99}
_EYE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
_EYE |= {"image_size": 8, "patch_size": 4}
IMAGE = 98


def llava():
    eye, text = transformers.CLIPVisionConfig(**_EYE), transformers.LlamaConfig(**_TEXT)
    config = transformers.LlavaConfig(
        text_config=text, vision_config=eye, image_token_id=IMAGE, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config)


def gemma3():
    text = _TEXT | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    ids = {"image_token_id": IMAGE, "boi_token_index": 96, "eoi_token_index": 97}
    config = transformers.Gemma3Config(text_config=text, vision_config=dict(_EYE), mm_tokens_per_image=4, **ids)
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen2_vl(**more):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], **more}
    eye = {"depth": 1, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "mlp_ratio": 1, "patch_size": 4}
    ids = {"image_token_id": IMAGE, "video_token_id": 97, "vision_start_token_id": 96}
    text = _TEXT | {"rope_parameters": rope}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=eye, **ids)
    return transformers.Qwen2VLForConditionalGeneration(config)


@pytest.mark.parametrize("make", [llava, gemma3, qwen2_vl], ids=lambda make: make.__name__)
def test_rows_of_text_are_exact_and_the_tower_is_left_alone(make):
    model, texts = with_weights(make), examples((5, 9, 7), vocab_size=95)
    with torch.no_grad():
        alone = torch.cat([model(input_ids=each).logits for each in texts], dim=1)
        padfree_patch.apply(model)
        found = model(**pack(texts)).logits
    assert conformance.largest(found - alone) < conformance.LOGIT_TOLERANCE * conformance.largest(alone)
    names = [name for name, each in model.named_modules() if each in OptIn.all_in(model)]
    assert names and not [name for name in names if "vision" in name or "visual" in name]


def dynamic_qwen2_vl():
    return qwen2_vl(rope_type="dynamic", factor=4.0)


def test_positions_on_three_axes_are_rotated_by_each_examples_own_length(monkeypatch):
    """Dynamic rope changes from 16 tokens on."""
    monkeypatch.setitem(_TEXT, "max_position_embeddings", 16)
    model, texts = with_weights(dynamic_qwen2_vl), examples((12, 40, 24), vocab_size=95)

    def alone(make):
        with torch.no_grad():  # a new model for each: a rotary keeps what the longest has made of it
            return torch.cat([with_weights(make)(input_ids=each).logits for each in texts], dim=1)

    expected = alone(dynamic_qwen2_vl)
    assert conformance.largest(alone(qwen2_vl) - expected) > 1e-3  # the control
    padfree_patch.apply(model)
    with torch.no_grad():
        found = model(**pack(texts)).logits
    assert conformance.largest(found - expected) < conformance.LOGIT_TOLERANCE * conformance.largest(expected)


def test_images_in_the_place_of_tokens_are_exact():
    model = with_weights(llava)
    image = torch.full((1, 4), IMAGE)
    texts = [torch.cat([image, each], dim=1) for each in examples((5, 9), vocab_size=95)]
    seen = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = torch.cat([model(each, pixel_values=p[None]).logits for each, p in zip(texts, seen)], dim=1)
        mixed = model(**pack(texts), pixel_values=seen).logits
        padfree_patch.apply(model)
        found = model(**pack(texts), pixel_values=seen).logits
        other = model(**pack(texts), pixel_values=seen.flip(0)).logits
    bound = conformance.LOGIT_TOLERANCE * conformance.largest(alone)
    assert conformance.largest(found - alone) < bound
    assert min(conformance.largest(each - alone) for each in (mixed, other)) > 100 * bound  # the controls


@pytest.mark.parametrize(
    ("make", "given", "says"),
    [
        (
            gemma3,
            {"pixel_values": torch.zeros(1, 3, 8, 8)},
            "a packed row with pixel_values: tokens of an image see each",
        ),
        (qwen2_vl, {"image_grid_thw": torch.tensor([[1, 2, 2]])}, "it works out positions on three axes"),
    ],
)
def test_images_that_do_more_are_refused(make, given, says):
    model = padfree_patch.apply(with_weights(make))
    with pytest.raises(PadfreeError, match=says):
        model(**pack(examples((5, 9), vocab_size=95)), **given)
