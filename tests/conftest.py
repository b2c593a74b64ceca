"""Fixtures that the whole suite shares."""

from __future__ import annotations

import gc
import os

import pytest
import torch

pytest.register_assert_rewrite("helpers")  # so that their assertions show values as the tests' own do

from helpers.comparison import written
from helpers.models import MACHINERY, skip_if_unavailable
from padfree_patch.registry import Patch, registry
from padfree_patch.testing import conformance, examples, pack, tiny_model
from padfree_patch.wrapping import opt_in, seam

collect_ignore_glob = ["helpers/stand_ins/*", "helpers/kernel_stand_ins/*"]
if "PADFREE_FLASH_ATTENTION" not in os.environ:
    collect_ignore_glob.append("own_process/*")  # they want a process of their own; the nox sessions say when


def pytest_collection_finish():
    """Leaves what the imports made out of garbage collections: every restore makes one while a model is patched."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny tensors: threads only cost time here, and the suite runs one process per core."""
    torch.set_num_threads(int(os.environ.get("PADFREE_TEST_THREADS", "1")))  # test_processors.py wants more


@pytest.fixture
def measured(record_property):
    """`measured(claim, steps=..., loss=...)` keeps in pytest's report how close a run came to its oracle.

    Of the reports, tools/training_results.py makes docs/training-results.md.
    """
    return lambda claim, **figures: record_property("measured", written(claim, **figures))


@pytest.fixture(params=MACHINERY, ids=lambda patch: patch.model_type)
def patch(request) -> Patch:
    return request.param


@pytest.fixture(params=["eager", "sdpa"])
def implementation(request) -> str:
    return request.param


@pytest.fixture
def make(patch, implementation):
    """Makes the same tiny model of the architecture and implementation at hand on every call."""

    def make_model(**config):
        return tiny_model(patch, implementation, **config)

    skip_if_unavailable(make_model)
    return make_model


@pytest.fixture
def llama():
    """A tiny Llama for tests of the machinery that no architecture changes."""
    return tiny_model(registry().get("llama"), "sdpa")


@pytest.fixture
def batch():
    return pack(examples(conformance.LENGTHS))


@pytest.fixture
def alone(make):
    return conformance.logits_alone(make, examples(conformance.LENGTHS))


@pytest.fixture
def clean_start():
    """Takes out the seams of models that earlier tests have left behind as garbage."""
    gc.collect()
    opt_in.living.clear()
    opt_in.remove_unused_seams()
    assert not seam.installed
