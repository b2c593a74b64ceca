"""Mixers whose kernels are told where sequences begin: run with stand-ins for the packages of these kernels.

tests/any_decoder/test_kernels.py runs it, in a process in which transformers finds tests/helpers/kernel_stand_ins.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import recurrences
import torch

from helpers.any_decoder import maker
from helpers.models import assert_exact
from padfree_patch import applied, apply
from padfree_patch.any_decoder.whole_row import seq_idx_of
from padfree_patch.batch.sequences import PackedSequences
from padfree_patch.patching import way_of
from padfree_patch.testing import checkpointing, conformance, examples, pack
from padfree_patch.testing.shared_prompts import check_shared_prompts
from padfree_patch.wrapping.opt_in import OptIn

TOLD = "by kernels that are told where sequences begin"
KERNELS = {
    "qwen3_next": {"causal_conv1d_fn", "chunk_gated_delta_rule"},
    "mamba2": {"causal_conv1d_fn", "mamba_chunk_scan_combined"},
    "lfm2": {"causal_conv1d_fn"},
}
"""What each model's mixers call."""


@pytest.fixture(params=KERNELS)
def model_type(request):
    return request.param


@pytest.fixture
def make(model_type):
    return maker(model_type)


@pytest.fixture
def all_hear():
    yield
    recurrences.deaf.clear()


def calls_of(model, batch) -> list[str]:
    """Returns the kernels that a call calls, each time by name."""
    recurrences.calls.clear()
    model(**batch)
    return list(recurrences.calls)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_told_kernels_run_once_for_all_examples(make, model_type, training):
    """Control: alone, each of the three examples calls them as often as the row does."""
    three = examples((11, 7, 14))
    once = calls_of(make().train(training), {"input_ids": three[0]})
    assert set(once) == KERNELS[model_type]
    with applied(make()) as model:
        assert TOLD in way_of(model)
        assert calls_of(model.train(training), pack(three)) == once


# Not what a call costs: the stand-ins read on the host what they are told.
@pytest.mark.parametrize(
    "check",
    [conformance.check_gradients, conformance.check_two_forwards, conformance.check_ordinary_calls],
    ids=lambda check: check.__name__,
)
def test_told_mixers_pass(check, make):
    check(make)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradients_survive_checkpointing(make, reentrant):
    if not make().supports_gradient_checkpointing:
        pytest.skip("upstream has none")
    conformance.check_gradients(make, prepare=checkpointing(reentrant=reentrant))


@pytest.mark.usefixtures("all_hear")
def test_kernel_that_does_not_listen_is_called_for_each_sequence(make, model_type):
    for name in KERNELS[model_type]:
        recurrences.deaf = {name}
        with applied(make()) as model:
            assert TOLD not in way_of(model)
        conformance.check_logits(make)
        conformance.check_gradients(make)


@pytest.mark.usefixtures("all_hear")
def test_kernel_of_training_alone_is_tried_too():
    """In eval mode Mamba 2 calls others, which listen: a check in eval mode alone would pass."""
    make = maker("mamba2")
    recurrences.deaf = {"mamba_split_conv1d_scan_combined"}
    with applied(make()) as model:
        assert TOLD not in way_of(model)
    conformance.check_gradients(make)


def test_what_kernels_cannot_be_told_runs_on_each_sequence(make):
    """Several rows, and prompts that examples share."""
    conformance.check_rows(make)
    check_shared_prompts(make)


@pytest.mark.parametrize("way_there", ["another device", "not checked"])
def test_kernels_that_were_not_tried_run_on_each_sequence(make, way_there):
    three = examples((11, 7, 14))
    alone = conformance.logits_alone(make, three)
    model = apply(make(), verify=way_there != "not checked")
    for each in OptIn.all_in(model).values():
        each.told_on = each.told_on and "cuda"  # as if it had been verified there
    once = calls_of(make(), {"input_ids": three[0]})
    assert len(calls_of(model, pack(three))) == 3 * len(once)
    assert_exact(model, pack(three), alone)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_told_too(make, copied):
    three = examples((11, 7, 14))
    model = copied(apply(make()))
    assert calls_of(model, pack(three)) == calls_of(make(), {"input_ids": three[0]})


def test_number_of_each_token():
    found = seq_idx_of(PackedSequences.from_cu_seqlens(torch.tensor([0, 2, 5, 5], dtype=torch.int32)))
    assert found.dtype == torch.int32
    assert found.tolist() == [[0, 0, 1, 1, 1]]
