"""Rotaries that look at a length: every example is rotated by its own, and nobody else's stays behind."""

from __future__ import annotations

import pytest
import torch

from padfree_patch import applied
from padfree_patch.registry import registry
from padfree_patch.seams import rotary as rotaries
from padfree_patch.testing import conformance, examples, pack, tiny_model

pytestmark = pytest.mark.versions


DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16}


@pytest.fixture
def make(implementation):
    return lambda: tiny_model(registry().get("llama"), implementation, **DYNAMIC)


@pytest.mark.parametrize("lengths", [(10, 8, 12), (10, 20, 12), (30, 3, 20), (16, 17)], ids=str)
def test_each_sequence_is_rotated_by_its_own_length(make, lengths):
    sequences = examples(lengths)
    alone = conformance.logits_alone(make, sequences)
    with applied(make()) as model, torch.no_grad():
        for _ in range(2):  # the second time, upstream's rotary would remember the first
            error = conformance.largest(model(**pack(sequences)).logits - alone)
            assert error < conformance.LOGIT_TOLERANCE * conformance.largest(alone)


def test_upstream_rotates_all_examples_by_the_longest(make):
    """The control: unpatched, and with a mask that isolates, a long neighbour rotates the short example otherwise."""
    short, long = examples((10, 40))
    with torch.no_grad():
        alone = make()(input_ids=short).logits
        padded = torch.cat([torch.cat([short, torch.zeros(1, 30, dtype=torch.int64)], 1), long])
        mask = torch.tensor([[1] * 10 + [0] * 30, [1] * 40])
        beside = make()(input_ids=padded, attention_mask=mask).logits[:1, :10]
    assert conformance.largest(beside - alone) > 10 * conformance.LOGIT_TOLERANCE * conformance.largest(alone)


def test_packed_batch_leaves_no_trace_in_a_rotary(make):
    (after,) = examples((12,))
    expected = make()(input_ids=after).logits
    with applied(make()) as model:
        model(**pack(examples((30, 10))))
        assert torch.equal(model(input_ids=after).logits, expected)


def test_each_sequence_of_several_rows_is_rotated_by_its_own_length(make):
    rows = [examples((20, 6)), examples((4, 22), seed=3)]
    alone = torch.cat([conformance.logits_alone(make, row) for row in rows])
    batches = [pack(row) for row in rows]
    batch = {name: torch.cat([each[name] for each in batches]) for name in batches[0]}
    with applied(make()) as model, torch.no_grad():
        error = conformance.largest(model(**batch).logits - alone)
    assert error < conformance.LOGIT_TOLERANCE * conformance.largest(alone)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradients_are_right_when_checkpointing_runs_a_rotary_again(make, reentrant):
    conformance.check_gradients(make, prepare=conformance.checkpointing(reentrant=reentrant))


def test_what_a_rotary_has_learned_stays_its_own(make):
    """Mistral Large 4 has such; here one is given to Llama's."""
    model = make()
    rotary = next(module for module in model.modules() if rotaries.depends_on_length(module))
    rotary.alpha = torch.nn.Parameter(torch.full((1,), 3.0))
    with rotaries.as_new(model):
        assert rotary.alpha.item() == 3.0
    assert rotary.alpha.item() == 3.0
