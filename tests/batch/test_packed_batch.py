"""The verdict on a batch is found again by its layers, and never another batch's."""

from __future__ import annotations

import pytest
import torch

from padfree_patch import PackedSequences, PadfreeError
from padfree_patch.batch import packed_batch
from padfree_patch.batch.packed_batch import batch_at_layer, read_batch
from padfree_patch.testing import SyncCounter, examples, pack


def read(positions, mask=None, **lengths):
    shape = tuple(positions.shape) if positions is not None else (1, 6)
    return read_batch(shape, torch.device("cpu"), position_ids=positions, attention_mask=mask, lengths=lengths)


def found_at_layer(boundaries, tokens=6):
    return batch_at_layer(boundaries, (1, tokens), torch.device("cpu"))


def positions_of(*lengths):
    return pack(examples(lengths))["position_ids"]


def test_layers_find_the_batch_without_a_sync_through_detached_copies():
    batch = read(positions_of(2, 4))
    with SyncCounter() as syncs:
        for seen in (batch.boundaries, batch.boundaries.detach(), batch.boundaries[None][0]):
            assert found_at_layer(seen) is batch
    assert syncs.total == 0


def test_layer_reads_a_batch_that_is_not_found_from_its_boundaries():
    batch = read(positions_of(2, 4))
    found = found_at_layer(batch.boundaries.clone())
    assert found is not batch
    assert found.sequences == batch.sequences
    assert torch.equal(found.position_ids, batch.position_ids)


def test_layer_that_finds_no_batch_keeps_the_positions_that_reached_it():
    positions = torch.tensor([[3, 4, 0, 1, 2, 3]])
    batch = read(positions)
    found = batch_at_layer(batch.boundaries.clone(), (1, 6), torch.device("cpu"), batch.position_ids.clone())
    assert found is not batch and torch.equal(found.position_ids, positions)


def test_layer_that_finds_no_batch_counts_from_zero_if_its_positions_fit_no_token():
    """Such as those of three axes, which some decoders hand to their layers."""
    batch = read(positions_of(2, 4))
    found = batch_at_layer(batch.boundaries.clone(), (1, 6), torch.device("cpu"), torch.zeros(3, 1, 6))
    assert torch.equal(found.position_ids, batch.position_ids)


def test_layer_finds_a_batch_whose_boundaries_were_copied_by_its_positions():
    """accelerate's hooks copy what is not on a layer's device; reading it there would wait in every layer."""
    batch = read(positions_of(2, 4))
    copied = batch.boundaries.clone()
    assert batch_at_layer(copied, (1, 6), torch.device("cpu"), batch.position_ids.detach()) is batch
    assert batch_at_layer(copied, (1, 6), torch.device("cpu"), positions_of(2, 4)) is not batch


def test_batches_of_one_shape_are_kept_apart():
    first, second = read(positions_of(2, 4)), read(positions_of(3, 3))
    assert found_at_layer(first.boundaries).sequences.lengths == (2, 4)
    assert found_at_layer(second.boundaries).sequences.lengths == (3, 3)


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
    assert len(packed_batch.known_batches) <= 32


def test_same_positions_are_read_anew_with_another_mask():
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


@pytest.mark.parametrize(
    ("positions", "mask"),
    [
        ([0, 1, 2, 3, 0, 1, 2], [0, 0, 1, 1, 1, 1, 1]),  # padding that the text's positions go on from
        ([0, 1, 0, 1, 2, 3, 4], [1, 1, 1, 1, 0, 0, 0]),
        ([0, 1, 0, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0]),
    ],
)
def test_layer_that_does_not_find_the_batch_reads_padding_right(positions, mask):
    batch = read(torch.tensor([positions]), torch.tensor([mask]))
    again = found_at_layer(batch.boundaries.clone(), len(positions))
    assert again.sequences == batch.sequences


def test_memory_changed_behind_torchs_back_is_noticed():
    array = positions_of(2, 4).numpy()
    assert read(torch.from_numpy(array)).sequences.lengths == (2, 4)
    array[:] = positions_of(3, 3).numpy()
    assert read(torch.from_numpy(array)).sequences.lengths == (3, 3)


def test_lengths_and_padding_are_read_together():
    mask = torch.tensor([[1, 1, 0, 1, 1, 0]])
    lengths = {"cu_seq_lens_q": torch.tensor([0, 3, 6])}
    assert read(None, mask, **lengths).sequences.lengths == (2, 1, 2, 1)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (
            {"cu_seq_lens_q": [0, 2, 6], "cu_seq_lens_k": [0, 3, 6]},
            "cu_seq_lens_q and cu_seq_lens_k disagree",
        ),
        ({"cu_seq_lens_q": [0, 2, 6], "cu_seq_lens_k": [0, 2, 4, 6]}, r"disagree \(\(2, 4\) against \(2, 2, 2\)\)"),
        (
            {"cu_seq_lens_q": [0, 2, 6], "seq_idx": [[0, 0, 0, 1, 1, 1]]},
            "cu_seq_lens_q and seq_idx disagree",
        ),
        ({"cu_seq_lens_q": [0, 2, 6], "max_length_k": 3}, "max_length is 3, but the longest sequence has 4"),
        ({"packed_sequences": (2, 4), "cu_seq_lens_q": [0, 3, 6]}, "packed_sequences and cu_seq_lens_q disagree"),
        ({"packed_sequences": (2, 4), "max_length_q": 3}, "max_length_q is 3, but the longest sequence has 4"),
        ({"packed_sequences": (2, 4), "max_length_q": torch.tensor([3])}, "max_length_q is too small: the longest"),
        ({"packed_sequences": (2, 4), "max_length_q": torch.tensor([9.0])}, "max_length_q must be an integer"),
        ({"packed_sequences": [2, 4]}, "packed_sequences must be PackedSequences, found list"),
    ],
)
def test_dialects_of_lengths_must_agree(lengths, message):
    given = {
        name: PackedSequences.from_lengths(value)
        if isinstance(value, tuple)
        else torch.tensor(value)
        if name.startswith(("cu", "seq"))
        else value
        for name, value in lengths.items()
    }
    with pytest.raises(PadfreeError, match=message):
        read(None, **given)


def test_segments_that_cannot_be_meant_for_the_tokens_are_refused():
    with pytest.raises(PadfreeError, match=r"segment numbers of shape \(1, 4\) for \(1, 6\)"):
        read(None, torch.tensor([[1, 1, 2, 2]]))
