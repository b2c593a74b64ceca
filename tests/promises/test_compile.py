"""torch.compile of a patched model: exact, in any order, and ordinary calls stay one graph."""

from __future__ import annotations

import pytest
import torch

import padfree_patch
from helpers.models import MACHINERY, assert_exact
from padfree_patch.testing import conformance, examples, pack

pytestmark = pytest.mark.slow


LLAMA, MISTRAL = (pytest.param(patch, id=patch.model_type) for patch in MACHINERY[:2])
"""Without a window and loaded as eager, and with one and as sdpa: what compiles depends on each alone."""


@pytest.fixture(params=[LLAMA, MISTRAL])
def patch(request):
    return request.param


@pytest.fixture
def implementation(patch):
    return {LLAMA.id: "eager", MISTRAL.id: "sdpa"}[patch.model_type]


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "patch", [pytest.param(*LLAMA.values, id=LLAMA.id, marks=pytest.mark.versions), MISTRAL], indirect=True
)
def test_compiled_model_is_exact_on_batches_of_any_lengths(make, batch, alone):
    model = torch.compile(padfree_patch.apply(make()), backend="aot_eager")
    for _ in range(2):
        assert_exact(model, batch, alone)
    lengths = (3, 4, 6)
    other = conformance.logits_alone(make, examples(lengths))
    assert_exact(model, pack(examples(lengths)), other)
    padfree_patch.restore(model)


def test_model_that_was_compiled_before_apply_is_exact(make, batch, alone):
    model = torch.compile(make(), backend="aot_eager")
    with padfree_patch.applied(model):
        assert_exact(model, batch, alone)


@pytest.mark.parametrize("patch", [LLAMA], indirect=True)  # what Dynamo keeps does not depend on the architecture
@pytest.mark.parametrize("order", ["unpatched first", "patched, unpatched, patched", "same model before and after"])
def test_compiled_graphs_of_other_models_are_not_taken(make, batch, alone, order):
    """Dynamo keeps graphs per code object: the mark of a patched model must be a guard."""
    patched, other = make(), make()
    if order == "patched, unpatched, patched":
        padfree_patch.apply(patched)
        assert_exact(torch.compile(patched, backend="eager"), batch, alone)
    if order == "same model before and after":
        other = patched
    naive = torch.compile(other, backend="eager")(**batch).logits
    assert conformance.largest(naive - alone) > 1e-3
    padfree_patch.apply(patched)
    assert_exact(torch.compile(patched, backend="eager"), batch, alone)
    padfree_patch.restore(patched)


@pytest.mark.versions
def test_ordinary_call_stays_one_graph(llama):
    (ids,) = examples((9,))
    expected = torch.compile(llama, backend="eager", fullgraph=True)(input_ids=ids, use_cache=False).logits
    torch._dynamo.reset()
    padfree_patch.apply(llama)
    found = torch.compile(llama, backend="eager", fullgraph=True)(input_ids=ids, use_cache=False).logits
    assert torch.equal(found, expected)
