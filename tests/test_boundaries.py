"""The verdict on a batch is found again by its layers, and never another batch's."""

from __future__ import annotations

import torch

from padfree_patch import boundaries
from padfree_patch.testing import SyncCounter, examples, pack


def read(positions, mask=None, **lengths):
    shape = tuple(positions.shape) if positions is not None else (1, 6)
    return boundaries.read_batch(
        shape, torch.device("cpu"), position_ids=positions, attention_mask=mask, lengths=lengths
    )


def positions_of(*lengths):
    return pack(examples(lengths))["position_ids"]


def test_layers_find_the_batch_without_a_sync_through_detached_copies():
    batch = read(positions_of(2, 4))
    with SyncCounter() as syncs:
        for seen in (batch.position_ids, batch.position_ids.detach(), batch.position_ids.view(1, -1)):
            assert boundaries.batch_at_layer(seen) is batch
    assert syncs.total == 0


def test_miss_costs_a_sync_and_not_the_result():
    copy = read(positions_of(2, 4)).position_ids.clone()
    with SyncCounter() as syncs:
        assert boundaries.batch_at_layer(copy).sequences.lengths == (2, 4)
    assert syncs.total == 1


def test_batches_of_one_shape_are_kept_apart():
    first, second = read(positions_of(2, 4)), read(positions_of(3, 3))
    assert boundaries.batch_at_layer(first.position_ids).sequences.lengths == (2, 4)
    assert boundaries.batch_at_layer(second.position_ids).sequences.lengths == (3, 3)


def test_changing_the_callers_tensor_in_place_is_noticed():
    positions = positions_of(2, 4)
    assert read(positions).sequences.lengths == (2, 4)
    positions.copy_(positions_of(3, 3))
    assert read(positions).sequences.lengths == (3, 3)
    with torch.inference_mode():
        inference = positions_of(2, 4)
        assert read(inference).sequences.lengths == (2, 4)
        inference.copy_(positions_of(3, 3))
        assert read(inference).sequences.lengths == (3, 3)


def test_memory_of_a_freed_tensor_is_not_mistaken():
    for lengths in ((2, 4), (3, 3), (1, 5), (4, 2)) * 20:  # tensors of one size, each gone before the next
        assert read(positions_of(*lengths)).sequences.lengths == lengths


def test_cache_is_bounded():
    for _ in range(100):
        read(positions_of(2, 4))
    assert len(boundaries._cache._known) <= 32


def test_mask_belongs_to_the_verdict():
    positions = torch.tensor([[1, 1, 0, 1, 2, 3]])
    assert read(positions, torch.tensor([[0, 0, 1, 1, 1, 1]])) is None
    assert read(positions).sequences.lengths == (1, 1, 4)


def test_batch_without_positions_and_integer_mask_is_not_read():
    with SyncCounter() as syncs:
        assert read(None) is None
        assert read(None, torch.ones(1, 6, dtype=torch.bool)) is None
    assert syncs.total == 0


def test_lengths_that_make_every_row_one_sequence_are_ordinary():
    assert read(torch.arange(6).unsqueeze(0), cu_seq_lens_q=torch.tensor([0, 6])) is None
    assert read(torch.arange(3).repeat(2, 1), cu_seq_lens_q=torch.tensor([0, 3, 6])) is None
