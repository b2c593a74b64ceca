"""Sequences that go on from shared prompts: checked when they are made, and carried to every layer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from padfree_patch import PackedSequences, PadfreeError, versions
from padfree_patch.batch.packed_batch import batch_at_layer, read_batch
from padfree_patch.testing import SyncCounter

SHARED = PackedSequences.from_lengths([3, 2, 4, 1, 2], prefixes=[-1, 0, 0, -1, 3])
CPU = torch.device("cpu")


def read(sequences, positions=None, shape=None):
    shape = shape or (1, sequences.total)
    return read_batch(shape, CPU, position_ids=positions, attention_mask=None, lengths={"packed_sequences": sequences})


def test_positions_and_lengths_go_on_from_the_prompt():
    assert SHARED.position_ids().tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 0, 1, 2]
    assert SHARED.examples == (1, 2, 4) and SHARED.whole_lengths == (3, 5, 7, 1, 3)
    assert "5 sequences, 2 of them shared prompts" in repr(SHARED)


def test_prefixes_survive_copies_and_count_for_equality():
    for twin in (copy.deepcopy(SHARED), pickle.loads(pickle.dumps(SHARED)), SHARED.to("cpu")):
        assert twin == SHARED and hash(twin) == hash(SHARED) and twin.prefixes == SHARED.prefixes
    assert PackedSequences.from_lengths(SHARED.lengths) != SHARED
    assert PackedSequences.from_lengths([1, 2], prefixes=[-1, -1]).prefixes is None


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        ([-1], "there are 3 sequences, but 1 prefixes"),
        ([-1, 2, 0], "sequence 1 has prefix 2; it must be an earlier sequence"),
        ([-1, 1, 0], "sequence 1 has prefix 1"),
        ([-1, -2, 0], "sequence 1 has prefix -2"),
        ([-1, 0, 1], "goes on from sequence 1, which goes on from 0"),
        ([-1, 0.5, 0], "prefixes must be whole numbers"),
    ],
)
def test_prefixes_that_can_not_be_are_errors(prefixes, message):
    with pytest.raises(PadfreeError, match=message):
        PackedSequences.from_lengths([2, 3, 1], prefixes=prefixes)


@pytest.mark.versions
@pytest.mark.parametrize("tokens", [(), (1,)], ids=["as they are", "as many values as tokens"])
def test_layer_that_finds_no_batch_reads_the_prompts_from_its_boundaries(tokens):
    lengths, prefixes = [3, 2, 4, 1, 2, *tokens * 1], [-1, 0, 0, -1, 3, *(-1,) * len(tokens)]
    sequences = PackedSequences.from_lengths(lengths, prefixes=prefixes)
    batch = read(sequences)
    found = batch_at_layer(batch.boundaries.clone(), (1, sequences.total), CPU)
    assert found is not batch and found.sequences == sequences
    assert torch.equal(found.position_ids, batch.position_ids)
    assert len(batch.boundaries) != sequences.total
    assert (0 in batch.boundaries) == (not versions.transformers("<4.35"))


def test_a_layer_finds_the_batch_without_a_sync():
    batch = read(SHARED)
    with SyncCounter() as syncs:
        assert batch_at_layer(batch.boundaries.detach(), (1, SHARED.total), CPU) is batch
    assert syncs.total == 0


def test_positions_from_zero_count_from_the_beginning_of_the_prompt():
    batch = read(SHARED, SHARED.position_ids()[None] + 5)
    assert torch.equal(batch.positions_from_zero[0], SHARED.position_ids()) and batch.last_lengths == [3]


@pytest.mark.parametrize("changed", [3, 5, 10], ids=["first branch", "second branch", "second prompt's"])
def test_positions_must_go_on_from_the_prompt(changed):
    positions = SHARED.position_ids()[None].clone()
    read(SHARED, positions)
    positions[0, changed:] += 1
    with pytest.raises(PadfreeError, match="position_ids and the given lengths disagree"):
        read(SHARED, positions)


def test_prompt_must_stand_in_the_row_of_its_examples():
    read(PackedSequences.from_lengths([2, 4, 3, 3], prefixes=[-1, 0, -1, 2]), shape=(2, 6))
    with pytest.raises(PadfreeError, match="sequence 3 in row 1 goes on from a prompt in row 0"):
        read(PackedSequences.from_lengths([2, 4, 3, 3], prefixes=[-1, 0, -1, 0]), shape=(2, 6))


def test_mask_beside_shared_prompts_is_an_error():
    for mask in (torch.ones(1, 12), torch.zeros(1, 1, 12, 12)):
        with pytest.raises(PadfreeError, match="leave the mask out"):
            read_batch((1, 12), CPU, position_ids=None, attention_mask=mask, lengths={"packed_sequences": SHARED})
