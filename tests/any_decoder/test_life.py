"""Models without a registered patch: applied twice, copied, pickled, restored, with LoRA, with something replaced."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import types
import weakref

import pytest
import torch

import padfree_patch
from helpers.any_decoder import maker, tiny_decoder
from helpers.models import assert_exact
from helpers.snapshots import snapshot
from padfree_patch import PackedSequences, PadfreeError
from padfree_patch.patching import places, way_of
from padfree_patch.testing import conformance, examples, pack
from padfree_patch.wrapping import seam
from padfree_patch.wrapping.opt_in import OptIn

pytestmark = pytest.mark.versions

TEXTS = examples((5, 9, 1, 12))


@pytest.fixture(params=["gpt2", "rwkv"])
def make(request):
    """One by its mask alone, one with modules that verify names."""
    return maker(request.param)


@pytest.fixture
def alone(make):
    return conformance.logits_alone(make, TEXTS)


def test_restored_model_is_the_same_object_for_object(make, clean_start):
    model = make()
    model(input_ids=pack(TEXTS)["input_ids"])  # RWKV notes at its first call that its weights are those for inference
    before = snapshot(model)
    padfree_patch.apply(model)
    assert snapshot(model) != before
    padfree_patch.restore(model)
    assert snapshot(model) == before and not seam.installed


def test_applied_twice_is_applied_once(make, alone, clean_start):
    """What was there would answer for a second way that lacks it, and go with it at the next restore."""
    model = padfree_patch.apply(make())
    way, where = way_of(model), places(model)
    padfree_patch.apply(model)
    assert (way_of(model), places(model)) == (way, where)
    with padfree_patch.applied(make()):
        pass  # the restore takes out what no model needs
    assert_exact(model, pack(TEXTS), alone)


def test_lengths_say_it_too(make, alone):
    model, lengths = padfree_patch.apply(make()), PackedSequences.from_lengths([5, 9, 1, 12])
    assert_exact(model, {"input_ids": torch.cat(TEXTS, dim=1), "packed_sequences": lengths}, alone)


@pytest.mark.parametrize("make", ["rwkv"], indirect=True)  # seconds each: another process
def test_copies_stay_patched(make, alone, tmp_path):
    model = padfree_patch.apply(make())
    assert_exact(copy.deepcopy(model), pack(TEXTS), alone)
    path = tmp_path / "model.pickle"
    path.write_bytes(pickle.dumps(model))
    assert_exact(pickle.loads(path.read_bytes()), pack(TEXTS), alone)
    torch.save((pack(TEXTS), alone), tmp_path / "batch.pt")
    code = (
        "import pickle, torch; model = pickle.load(open('model.pickle', 'rb')); "
        "batch, alone = torch.load('batch.pt'); print(float((model(**batch).logits - alone).abs().max()))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(run.stdout) < conformance.LOGIT_TOLERANCE * conformance.largest(alone)


def test_replaced_forward_of_a_layer_is_an_error():
    model = padfree_patch.apply(tiny_decoder("gpt2"))
    model(**pack(TEXTS))
    block = model.transformer.h[1].attn
    block.forward = types.MethodType(lambda self, hidden_states, *args, **kwargs: (hidden_states, None), block)
    with pytest.raises(PadfreeError, match="ran 1 layers with patched attention, and apply had patched 2"):
        model(**pack(TEXTS))


def test_dropped_layers_are_no_error():
    model = padfree_patch.apply(tiny_decoder("bart", decoder_layerdrop=0.9)).train()
    for _ in range(5):
        model(**pack(TEXTS))
    with pytest.raises(PadfreeError, match="and apply had patched"):  # the control: not dropped, but taken out
        model.eval().model.decoder.layers = model.model.decoder.layers[:1]
        model(**pack(TEXTS))


def test_model_is_let_go(clean_start):
    model = padfree_patch.apply(tiny_decoder("gpt2"))
    model(**pack(TEXTS))
    gone = weakref.ref(model.transformer)
    del model
    gc.collect()
    assert gone() is None and not seam.installed


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # of GPT-2's layers, which PEFT sees by itself
def test_lora_before_and_after(alone, make):
    peft = pytest.importorskip("peft", minversion="0.8")  # before it, "all-linear" is no target
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    for first in (True, False):
        torch.manual_seed(0)
        model = peft.get_peft_model(padfree_patch.apply(make()) if first else make(), config)
        with torch.no_grad():
            expected = torch.cat([copy.deepcopy(model)(input_ids=each).logits for each in TEXTS], dim=1)
        if not first:
            padfree_patch.apply(model)
        assert_exact(model, pack(TEXTS), expected)
        assert conformance.largest(expected - alone) > 1e-2  # the adapters do something


def test_way_is_explained():
    model = tiny_decoder("rwkv")
    explained = padfree_patch.explain(model)
    assert "RwkvSelfAttention" in explained.way and "named by verify" in explained.way
    assert f"found in the model and verified: {explained.way}" in str(explained)
    assert not OptIn.all_in(model)
