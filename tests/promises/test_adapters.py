"""Adapters, quantised weights and lower precisions train on a packed row as on each example alone."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from packaging.version import Version
from torch import nn

import padfree_patch
from helpers.comparison import gradients_apart
from padfree_patch.registry import pretrained_modules, registry
from padfree_patch.testing import conformance, examples, pack

pytestmark = pytest.mark.versions


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # bitsandbytes about what it lacks on a CPU
    import bitsandbytes

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
SEQUENCES = examples(conformance.LENGTHS)


@pytest.fixture
def patch():
    """Nothing here depends on the architecture."""
    return registry().get("llama")


@pytest.fixture
def implementation():
    """Nor on this."""
    return "sdpa"


def adapted(model):
    """With LoRA on every projection, and no B of zeros, behind which A would get no gradient."""
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def switch_checkpointing_on(model, kind):
    conformance.checkpointing(reentrant=kind == "reentrant")(pretrained_modules(model)[0])


def loss_and_gradients(model):
    """Of the packed row."""
    batch = pack(SEQUENCES)
    loss = model.train()(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def apart_from_alone(make_alone, packed):
    """How far the loss and every trainable parameter's gradient are from those of each example alone."""
    expected = conformance.alone_loss_and_gradients(make_alone, SEQUENCES)
    found = loss_and_gradients(packed)
    assert found[1].keys() == expected[1].keys() and all(each.norm() > 0 for each in expected[1].values())
    return abs(found[0] - expected[0]), gradients_apart(found[1], expected[1])


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize("first", ["apply", "get_peft_model"])
def test_lora_trains_like_alone(make, measured, first, checkpointing):
    steps = [padfree_patch.apply, adapted] if first == "apply" else [adapted, padfree_patch.apply]
    packed = steps[1](steps[0](make()))
    if checkpointing:
        switch_checkpointing_on(packed, checkpointing)
    loss, gradients = apart_from_alone(lambda: adapted(make()), packed)
    assert loss <= 1e-5 and gradients <= conformance.GRADIENT_TOLERANCE  # float32 sums in another order
    claim = f"LoRA, {first} first{f', {checkpointing} checkpointing' if checkpointing else ''}"
    measured(claim, library="peft", steps=1, loss=loss, gradients=gradients)


def test_lora_without_the_patch_trains_something_else(make):
    """The control."""
    _, gradients = apart_from_alone(lambda: adapted(make()), adapted(make()))
    assert gradients > 100 * conformance.GRADIENT_TOLERANCE


def test_merged_adapter_stays_patched(make, batch):
    merged = padfree_patch.apply(adapted(make()).eval()).merge_and_unload()
    alone = conformance.logits_alone(lambda: adapted(make()).eval().merge_and_unload(), SEQUENCES)
    with torch.no_grad():
        error = conformance.largest(merged(**batch).logits - alone) / conformance.largest(alone)
    assert error < conformance.LOGIT_TOLERANCE


def quantised(model, kind):
    """Every projection as bitsandbytes' linear, computing in float32; frozen, as it is trained with adapters."""
    for module in list(model.modules()):
        for name, linear in list(module.named_children()):
            if not isinstance(linear, nn.Linear) or name == "lm_head":
                continue
            sizes = linear.in_features, linear.out_features, linear.bias is not None
            if kind == "4bit":
                new = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
            else:
                new = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
            new.load_state_dict(linear.state_dict())
            setattr(module, name, new.to("cpu"))  # which quantises
    setattr(model, f"is_loaded_in_{kind}", True)  # as transformers does; PEFT asks for it
    return model.requires_grad_(False)


QUANTISABLE = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 64}
"""Sizes that every 4-bit kernel of bitsandbytes takes: with AVX512-BF16 outputs come in blocks of 32, inputs of 64."""

WITHOUT_AVX512_BF16 = "4bit, no AVX512-BF16"
"""As on a processor that has none; one that has it rewrites the weights in the first call without gradients."""

# An activation that rounding moves over the edge of one of 255 steps moves what is behind it; the control is far off.
QUANTISED = {
    "4bit": conformance.GRADIENT_TOLERANCE,
    WITHOUT_AVX512_BF16: conformance.GRADIENT_TOLERANCE,
    "8bit": 2e-2,
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_lora_on_quantised_weights_trains_like_alone(make, measured, monkeypatch, kind):
    if kind == "8bit" and Version(peft.__version__) < Version("0.14"):
        pytest.skip("this PEFT's 8-bit LoRA needs a bitsandbytes of its time, which needs CUDA")

    if kind == WITHOUT_AVX512_BF16:
        monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)

    def make_alone():
        return adapted(quantised(make(**QUANTISABLE), kind.split(",")[0]))

    packed = padfree_patch.apply(make_alone())
    switch_checkpointing_on(packed, "reentrant")
    loss, gradients = apart_from_alone(make_alone, packed)
    assert gradients <= QUANTISED[kind] and loss <= QUANTISED[kind]
    if kind != WITHOUT_AVX512_BF16:
        claim = f"LoRA on {kind} linears, checkpointing"
        measured(claim, library="bitsandbytes", steps=1, loss=loss, gradients=gradients)
    _, unpatched = apart_from_alone(make_alone, make_alone())
    assert unpatched > 5 * QUANTISED[kind]


def norms_up(model):
    """As PEFT prepares a quantised model: what has one dimension is float32, the rest bfloat16."""
    for parameter in model.to(torch.bfloat16).parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data.float()
    return model


PRECISIONS = {
    "bfloat16": (lambda model: model.to(torch.bfloat16), False),
    "float32 under autocast": (lambda model: model, True),
    "bfloat16, norms float32, under autocast": (norms_up, True),
    "bfloat16, norms and LoRA float32, under autocast": (lambda model: adapted(norms_up(model)), True),
}


class Called(nn.Module):
    """The model as a trainer with or without bf16=True calls it."""

    def __init__(self, model, autocast):
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, **batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.model(**batch)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_lower_precision_errs_no_more_than_each_example_alone(make, measured, precision, checkpointing):
    """Loss and gradients, measured against float32."""
    prepare, autocast = PRECISIONS[precision]

    exact = conformance.alone_loss_and_gradients(lambda: Called(prepare(make()).float(), False), SEQUENCES)
    alone = conformance.alone_loss_and_gradients(lambda: Called(prepare(make()), autocast), SEQUENCES)
    packed = padfree_patch.apply(prepare(make()))
    if checkpointing:
        switch_checkpointing_on(packed, "non-reentrant")
    found = loss_and_gradients(Called(packed, autocast))
    errors = [gradients_apart(each[1], exact[1], together=True) for each in (found, alone)]
    # The same roundings in another order: over twelve draws of examples the ratio has mean 0.99, and is 0.4 to 2.2.
    assert errors[0] <= 3 * errors[1]
    assert abs(found[0] - exact[0]) <= 2**-7 * exact[0]  # bfloat16 has eight bits
    unpatched = loss_and_gradients(Called(prepare(make()), autocast))  # the control
    assert gradients_apart(unpatched[1], exact[1], together=True) > 10 * errors[1]
    claim = f"{precision}{', checkpointing' * checkpointing}: error against float32"
    measured(claim, library="peft", steps=1, loss=abs(found[0] - exact[0]), gradients=errors[0])
