"""PEFT's methods, before and after apply: exact, or refused by name; tools/peft_methods.py tries all of them."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
import transformers

import padfree_patch
from helpers.peft_benches import bench_or_skip
from helpers.snapshots import snapshot
from padfree_patch import PadfreeError
from padfree_patch.testing import conformance, pack, pad
from padfree_patch.wrapping.opt_in import OptIn
from padfree_patch.wrapping.seam import Seam
from peft_methods import EXACT, INVOCATION, ORDERS, Bench, methods, texts, verdict
from peft_page import PAGE, rows_on

pytestmark = [pytest.mark.versions, pytest.mark.filterwarnings("ignore")]  # PEFT's own

VIRTUAL = "puts virtual tokens before each row"
REFUSED = {
    "PROMPT_TUNING": VIRTUAL,
    "P_TUNING": VIRTUAL,
    "PREFIX_TUNING": VIRTUAL,
    "MULTITASK_PROMPT_TUNING": VIRTUAL,
    "CPT": VIRTUAL,
    "CARTRIDGE": VIRTUAL,
    "LORA, activated (aLoRA)": "begins where a row has its invocation tokens for the last time",
    "LILY": "weighs its experts by their mean over all tokens of a batch",
    "LORA, VeLoRA": "estimates each example's gradients by the mean over all tokens",
}
ACTIVATED = "LORA, activated (aLoRA)"
ROWS = list(rows_on(PAGE.read_text()))
PER_ROW_OR_TOKEN = ["POLY", "XLORA", "ADAPTION_PROMPT", "TRAINABLE_TOKENS", "SHADOW"]
PER_ROW_OR_TOKEN += ["LORA, Arrow", "LORA, on embeddings"]


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


def bench_of(name):
    """Skips the test if the installed PEFT does not have the method, or the page says that it can't run it."""
    bench = bench_or_skip(name)
    try:
        return bench, bench.alone()
    except Exception as error:
        if not any(row[0] == name and row[1].startswith("PEFT fails") and peft.__version__ in row[2] for row in ROWS):
            raise
        pytest.skip(f"peft {peft.__version__} can't run it here: {error!r}")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", REFUSED)
def test_method_that_works_per_row_is_refused_by_name(name, order):
    bench, alone = bench_of(name)
    said = verdict(bench, order, alone)["said"]
    assert said.startswith("refused: PeftModelForCausalLM with ") and REFUSED[name] in said and "; " in said
    unchecked = Bench(name, methods()[name], num_key_value_heads=6)
    assert not padfree_patch.verify(unchecked.adapted(unchecked.base()))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", PER_ROW_OR_TOKEN)
def test_method_that_can_be_exact_is(name, order):
    bench, alone = bench_of(name)
    if (name, order) == ("SHADOW", "before"):
        pytest.skip("brings a decoder, which apply must see")
    assert verdict(bench, order, alone)["said"] == EXACT


def test_adapter_that_brings_a_decoder_after_apply_says_to_apply_again():
    bench, alone = bench_of("SHADOW")
    model = bench.adapted(padfree_patch.apply(bench.base()))
    with pytest.raises(
        padfree_patch.LeakError, match=r"with ShadowConfig, which came after padfree_patch\.apply, does"
    ):
        model(**pack(texts()))
    logits, _ = bench.packed(padfree_patch.apply(model))
    assert conformance.largest(logits - alone[0]) < conformance.LOGIT_TOLERANCE


def test_only_the_check_notices_an_adapter_that_mixes(llama):
    """The control: with nothing checked, the examples of the row change each other through a method that we allow."""
    if "SHADOW" not in methods():
        pytest.skip(f"peft {peft.__version__} has no SHADOW")
    model = padfree_patch.apply(llama, verify=False)
    adapted = peft.get_peft_model(model, peft.ShadowConfig(task_type="CAUSAL_LM", init_weights=False)).eval()
    with torch.no_grad():
        adapted(**pack(texts()))  # nothing was to be checked
        changed = pack(texts())
        changed["input_ids"][0, 0] = 90
        moved = (adapted(**changed).logits - adapted(**pack(texts())).logits)[:, texts()[0].shape[1] :].abs().max()
    assert moved > 1e-3
    checked = padfree_patch.apply(copy.deepcopy(adapted), verify=False)  # what the adapter brought is patched too
    assert padfree_patch.verify(checked)


@pytest.mark.parametrize("name", ["PROMPT_TUNING", "PREFIX_TUNING", "LORA, activated (aLoRA)"])
def test_padded_batch_of_a_refused_method_is_as_unpatched(name):
    bench, _ = bench_of(name)
    batch = pad(texts())
    plain = bench.adapted(bench.base())
    expected = plain(**batch)
    found = bench.adapted(padfree_patch.apply(bench.base()))(**batch)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)


def lora(**config):
    return peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], **config)


@pytest.mark.skipif(ACTIVATED not in methods(), reason=f"peft {peft.__version__} has no activated LoRA")
def test_switching_to_an_adapter_that_cannot_serve_the_row_is_noticed(llama):
    model = peft.get_peft_model(padfree_patch.apply(llama), lora(init_lora_weights=False))
    with torch.no_grad():
        before = model(**pack(texts())).logits
    model.add_adapter("activated", lora(alora_invocation_tokens=INVOCATION))
    model.set_adapter("activated")
    with pytest.raises(PadfreeError, match=r"PeftModelForCausalLM with LoraConfig \(activated LoRA\) begins where"):
        model(**pack(texts()))
    model.set_adapter("default")
    with torch.no_grad():
        assert torch.equal(model(**pack(texts())).logits, before)


def test_adapters_are_checked_once_each(llama, monkeypatch):
    model = peft.get_peft_model(padfree_patch.apply(llama), lora())
    model.add_adapter("other", lora())
    checks = []
    real = padfree_patch.verification.verify
    monkeypatch.setattr(padfree_patch.verification, "verify", lambda model: checks.append(model) or real(model))
    for name in ("default", "other", "default", "other"):
        model.set_adapter(name)
        model(**pack(texts()))
    assert checks == [model, model]
    copy.deepcopy(model)(**pack(texts()))
    assert len(checks) == 2


def test_adapters_that_come_without_peft_model_are_checked(llama):
    """As transformers' own add_adapter puts them in."""
    padfree_patch.apply(llama)
    peft.inject_adapter_in_model(lora(), llama)
    llama.peft_config = {"default": lora()}
    llama.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, output: output.cumsum(1))
    with pytest.raises(
        padfree_patch.LeakError, match=r"with LoraConfig, which came after padfree_patch\.apply, does not"
    ):
        llama(**pack(texts()))


def test_adapters_that_were_taken_out_again_say_nothing(llama):
    adapted = peft.get_peft_model(llama, lora())
    base = adapted.unload()
    base.peft_config = adapted.peft_config  # as older PEFTs leave it
    base.peft_config["default"].alora_invocation_tokens = INVOCATION
    assert padfree_patch.apply(base)


def test_saved_adapter_is_checked_where_it_is_loaded(llama):
    model = pickle.loads(pickle.dumps(peft.get_peft_model(padfree_patch.apply(llama), lora())))
    assert OptIn.of(model).check is not None
    model(**pack(texts()))


def test_seam_of_a_library_that_nobody_imported_is_left_alone():
    """A patched model that was saved beside PEFT is loaded without it."""
    absent = Seam(
        "no_such_library.model:Model", "forward", lambda args, kwargs: False, lambda call: None, optional=True
    )
    absent.install()
    absent.remove()


@pytest.mark.usefixtures("clean_start")
def test_restore_gives_peft_its_forwards_back(llama):
    model = peft.get_peft_model(llama, lora())
    before = snapshot(model)
    padfree_patch.apply(model)
    assert vars(peft.PeftModelForCausalLM)["forward"] is not before[peft.PeftModelForCausalLM]["forward"]
    padfree_patch.restore(model)
    assert snapshot(model) == before


def test_every_method_is_in_the_table():
    """A new one is missing there until `nox -s peft` has tried it."""
    assert {name for name, _, versions in ROWS if peft.__version__ in versions} == methods().keys()
    assert "WRONG" not in PAGE.read_text()


def test_gradient_that_only_the_packed_row_has_is_wrong(monkeypatch):
    bench, (logits, gradients) = bench_of("POLY")
    monkeypatch.setattr(Bench, "packed", lambda self, model: (logits, {**gradients, "more": torch.ones(3)}))
    assert verdict(bench, "before", (logits, gradients))["said"] == "WRONG"
    monkeypatch.setattr(Bench, "packed", lambda self, model: (logits, gradients))  # the control
    assert verdict(bench, "before", (logits, gradients))["said"] == EXACT
