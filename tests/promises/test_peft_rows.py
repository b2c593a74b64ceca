"""What PEFT is told of each row of a batch, and adapters that are off: packed rows are exact, or refused by name."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from packaging.version import Version

import padfree_patch
from helpers.comparison import gradients_apart
from helpers.peft_benches import bench_or_skip
from padfree_patch import PadfreeError
from padfree_patch.integrations.padded import pack_padded
from padfree_patch.testing import conformance, pack, pad
from peft_methods import INVOCATION, texts

pytestmark = [pytest.mark.versions, pytest.mark.filterwarnings("ignore")]  # PEFT's own

names_are_taken = pytest.mark.skipif(
    Version(peft.__version__) < Version("0.11"), reason=f"peft {peft.__version__} takes no adapter_names"
)
ROWS = texts()[:2], texts()[1::-1]
"""Two rows of one length, of two examples each."""


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


def base():
    return bench_or_skip("LORA").base()


def with_two(model, **second):
    """Puts in two LoRAs, of which "a" is active."""
    config = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**config), adapter_name="a")
    adapted.add_adapter("b", peft.LoraConfig(**config, **second))
    return adapted.eval()


def logits_of_each(model, sequences):
    with torch.no_grad():
        return torch.cat([model(**conformance.as_batch(each)).logits for each in sequences], dim=1)


def assert_close(found, expected):
    assert conformance.largest(found - expected) <= conformance.LOGIT_TOLERANCE * conformance.largest(expected)


@names_are_taken
@pytest.mark.parametrize("order", ["before", "after"])
def test_each_row_has_the_adapter_that_is_named_for_it(order):
    model = with_two(padfree_patch.apply(base())) if order == "before" else padfree_patch.apply(with_two(base()))
    rows = [pack(each) for each in ROWS]
    batch = {name: torch.cat([row[name] for row in rows]) for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        found = model(**batch, adapter_names=["b", "__base__"]).logits
    alone = with_two(base())
    with alone.disable_adapter():
        assert_close(found[1:], logits_of_each(alone, ROWS[1]))
    alone.set_adapter("b")
    assert_close(found[:1], logits_of_each(alone, ROWS[0]))
    assert conformance.largest(found[0] - model(**batch).logits[0]) > 1e-2  # the control: the active one is "a"


@names_are_taken
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b", "a", "b"], r"adapter_names has 4 value\(s\), the packed batch 1 row\(s\) of 4 examples"),
        (["c"], "has no adapter 'c', which adapter_names gives a row; it has a, b"),
        ("a", "takes adapter_names as a list with a name for each row, not 'a'"),
    ],
)
def test_names_that_a_packed_row_cannot_have_are_refused(names, message):
    model = with_two(padfree_patch.apply(base()))
    with pytest.raises(PadfreeError, match=f"^PeftModelForCausalLM.* {message}"):
        model(**pack(texts()), adapter_names=names)
    assert model(**pad(texts()), adapter_names=["a", "b", "a", "__base__"]).logits.shape[0] == 4  # those are PEFT's


def test_names_that_nobody_heeds_are_refused():
    """PEFT would run the active adapter for every row, and say nothing."""
    model = bench_or_skip("IA3").adapted(padfree_patch.apply(base()))
    for called, who in ((model, "PeftModelForCausalLM"), (model.get_base_model(), "LlamaForCausalLM")):
        with pytest.raises(PadfreeError, match=f"{who} with IA3Config ignores adapter_names.*; call set_adapter"):
            called(**pack(texts()), adapter_names=["__base__"])
    assert model(**pack(texts())).logits.shape[0] == 1


@pytest.mark.parametrize("order", ["before", "after"])
def test_an_activated_adapter_that_is_only_named_is_refused(order):
    bench_or_skip("LORA, activated (aLoRA)")
    second = {"alora_invocation_tokens": INVOCATION}
    if order == "before":
        model = with_two(padfree_patch.apply(base()), **second)
    else:
        model = padfree_patch.apply(with_two(base(), **second))
    with pytest.raises(PadfreeError, match=r"with LoraConfig \(activated LoRA\) begins where a row has its"):
        model(**pack(texts()), adapter_names=["b"])
    assert model(**pack(texts()), adapter_names=["a"]).logits.shape[0] == 1


def test_a_task_for_each_example_of_a_row_is_refused():
    bench = bench_or_skip("POLY")
    model = bench.adapted(padfree_patch.apply(bench.base())).eval()
    with pytest.raises(PadfreeError, match=r"task_ids has 4 value\(s\), the packed batch 1 row\(s\) of 4 examples"):
        model(**pack(texts()), task_ids=torch.tensor([0, 1, 0, 1]))
    found = model(**pack(texts()), task_ids=torch.tensor([1])).logits
    alone = bench.adapted(bench.base()).eval()
    expected = [alone(**conformance.as_batch(each), task_ids=torch.tensor([1])).logits for each in texts()]
    assert_close(found, torch.cat(expected, dim=1))


LOOKED_AT = ["POLY", "XLORA", "SHADOW", "LILY", "LORA, activated (aLoRA)"]


@pytest.mark.parametrize("name", [*LOOKED_AT, "LORA", "PROMPT_TUNING"])
def test_rows_that_peft_looks_at_stay_rows_inside_pack_padded(name):
    bench = bench_or_skip(name)
    batch = pad(texts())
    tasks = {"task_ids": torch.tensor([0, 1, 0, 1])} if name == "POLY" else {}

    def result(model):
        output = model.eval()(**batch, **tasks)
        output.loss.backward()
        logits = output.logits[:, -batch["input_ids"].shape[1] :][batch["attention_mask"].bool()]
        return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected = result(bench.adapted(bench.base()))
    base = padfree_patch.apply(bench.base())
    pack_padded(base)
    rows = []
    base.model.layers[0].register_forward_hook(lambda module, args, output: rows.append(args[0].shape[0]))
    found = result(bench.adapted(base))
    assert set(rows) == {4 if name in LOOKED_AT else 1}
    assert_close(found[0], expected[0])
    moved = {each: gradient for each, gradient in expected[1].items() if gradient.norm() > 0}
    assert gradients_apart(found[1], moved) < conformance.GRADIENT_TOLERANCE


@pytest.mark.parametrize(
    "name", ["PROMPT_TUNING", "PREFIX_TUNING", "LORA, activated (aLoRA)", "LILY", "SHADOW", "ADAPTION_PROMPT"]
)
def test_an_adapter_that_is_disabled_is_no_obstacle(name):
    bench = bench_or_skip(name)
    model = bench.adapted(padfree_patch.apply(bench.base())).eval()
    expected = logits_of_each(bench.base(), texts())
    for _ in range(2):
        with model.disable_adapter():
            assert_close(model(**pack(texts())).logits, expected)
        if name != "ADAPTION_PROMPT":  # the only one that can serve a packed row
            with pytest.raises(PadfreeError, match="PeftModelForCausalLM with "):
                model(**pack(texts()))


def test_the_check_leaves_as_trained_what_was(llama):
    """X-LoRA's forward, until PEFT 0.18, switches its LoRAs on: an optimizer made after apply would train those too."""

    def switch(module, args):
        llama.lm_head.weight.requires_grad_(False)
        llama.model.norm.weight.requires_grad_(True)

    llama.model.norm.weight.requires_grad_(False)
    llama.model.norm.register_forward_pre_hook(switch)
    padfree_patch.apply(llama)
    assert llama.lm_head.weight.requires_grad and not llama.model.norm.weight.requires_grad
