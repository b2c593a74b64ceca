"""PackedSequences: every dialect gives the same boundaries, and what makes no sense is refused with the values."""

from __future__ import annotations

import pickle

import pytest
import torch

from padfree_patch import PackedSequences, PadfreeError
from padfree_patch.batch.boundaries import read_tensors
from padfree_patch.batch.lengths import agrees
from padfree_patch.testing import SyncCounter


def row(*values: int) -> torch.Tensor:
    return torch.tensor([values])


def test_all_dialects_agree():
    expected = PackedSequences.from_lengths([2, 4, 3])
    for found in (
        PackedSequences.from_cu_seqlens(torch.tensor([0, 2, 6, 9], dtype=torch.int32)),
        PackedSequences.from_cu_seqlens([0, 2, 6, 9], max_seqlen=4, total=9),
        PackedSequences.from_position_ids(row(0, 1, 0, 1, 2, 3, 0, 1, 2)),
        PackedSequences.from_position_ids(row(7, 8, 0, 1, 2, 3, 5, 6, 7)),
        PackedSequences.from_attention_mask(row(1, 1, 2, 2, 2, 2, 3, 3, 3)),
        PackedSequences.from_attention_mask(row(1, 1, 2, 2, 2, 2, 0, 0, 0)),
    ):
        assert found == expected
        assert found.lengths == (2, 4, 3)
        assert found.cu_seqlens.tolist() == [0, 2, 6, 9]
        assert found.cu_seqlens.dtype == torch.int32
        assert (found.max_seqlen, found.total, len(found)) == (4, 9, 3)
        assert type(found.max_seqlen) is int
        assert all(type(length) is int for length in found.lengths)
        assert found.position_ids().tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 2]


def test_one_token_sequences_stay_apart():
    assert PackedSequences.from_position_ids(row(0, 0, 0)).lengths == (1, 1, 1)


def test_every_row_begins_a_sequence():
    rows = torch.tensor([[0, 1, 2], [3, 4, 0]])  # read as one row, the second would go on where the first ended
    assert PackedSequences.from_position_ids(rows).lengths == (3, 2, 1)


def test_pickling_and_moving_keep_the_lengths():
    packed = PackedSequences.from_lengths([2, 1])
    for other in (pickle.loads(pickle.dumps(packed)), packed.to("cpu")):
        with SyncCounter() as syncs:
            assert other.lengths == (2, 1)
        assert syncs.total == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PackedSequences.from_lengths([]), "no sequences"),
        (lambda: PackedSequences.from_lengths([3, 0, 2]), "sequence 1 has length 0"),
        (lambda: PackedSequences.from_lengths([3, 2], total=6), "cover 5 tokens, but the batch has 6"),
        (lambda: PackedSequences.from_cu_seqlens([1, 3]), "start at 1"),
        (lambda: PackedSequences.from_cu_seqlens([0, 3, 2]), "sequence 1 has length -1"),
        (lambda: PackedSequences.from_cu_seqlens([0, 3], total=4), "cover 3 tokens, but the batch has 4"),
        (lambda: PackedSequences.from_cu_seqlens([0, 3, 5], max_seqlen=2), "max_length is 2, but .* has 3 tokens"),
        (lambda: PackedSequences.from_cu_seqlens([0.0, 3.0]), "must be integers"),
        (lambda: PackedSequences.from_cu_seqlens([0]), "must be integers"),
        (lambda: PackedSequences.from_position_ids(torch.zeros(1, 1, 3)), "must be"),
        (lambda: PackedSequences.from_position_ids(torch.zeros(1, 0)), "at least one token"),
        (lambda: PackedSequences.from_attention_mask(row(1, 1, 2, 2, 1)), "comes back"),
    ],
)
def test_boundaries_that_make_no_sequences_are_refused(make, message):
    with pytest.raises(PadfreeError, match=message):
        make()


@pytest.mark.parametrize(
    ("positions", "mask", "expected"),
    [
        # ordinary batches
        ([0, 1, 2, 3], None, None),
        ([5, 6, 7, 8], None, None),
        (None, [1, 1, 1, 1], None),
        (None, [0, 0, 1, 1], None),
        ([0, 1, 2, 3], [1, 1, 1, 1], None),
        ([1, 1, 0, 1], [0, 0, 1, 1], None),  # generate, padded left
        ([0, 1, 2, 1], [1, 1, 1, 0], None),  # padded right
        ([0, 1, 2, 3], [1, 0, 1, 1], None),  # a hole, positions count all tokens
        ([0, 1, 1, 2], [1, 0, 1, 1], None),  # a hole, positions count real tokens
        # packed ones
        ([0, 1, 0, 1], None, [2, 2]),
        ([0, 1, 0, 1], [1, 1, 1, 1], [2, 2]),
        (None, [1, 1, 2, 0], [2, 1, 1]),
        ([0, 1, 0, 0], [1, 1, 2, 0], [2, 1, 1]),
        ([0, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [2, 1, 3]),  # the padded tail is one sequence
        ([0, 1, 0, 1, 2, 3], [1, 1, 1, 0, 0, 0], [2, 1, 3]),
        ([1, 1, 0, 1, 0, 1], [0, 0, 1, 1, 1, 1], [2, 2, 2]),  # padded left and packed
        ([0, 1, 2, 0, 1, 2], [1, 1, 0, 1, 1, 1], [2, 1, 3]),  # padding between two examples
    ],
)
def test_positions_and_mask_together_show_what_is_packed(positions, mask, expected):
    given = [None if values is None else torch.tensor([values]) for values in (positions, mask)]
    with SyncCounter() as syncs:
        found = read_tensors(*given)
    assert (found.lengths if found else None) == expected
    assert syncs.total == 1


@pytest.mark.parametrize(
    ("positions", "mask", "message"),
    [
        ([0, 1, 2, 0, 1], [1, 1, 2, 2, 2], "disagree in row 0 between tokens 1 and 2"),
        ([0, 1, 2, 3, 4], [1, 1, 2, 2, 2], "disagree in row 0 between tokens 1 and 2: segments 1, 2, but .* goes on"),
        ([0, 1, 0, 1, 2], [1, 1, 1, 1, 2], "disagree in row 0 between tokens 1 and 2: segments 1, 1, but .* restarts"),
        ([0, 1, 2, 3, 0], [1, 0, 1, 1, 1], "a 0 inside a sequence .* row 0, after token 0"),
    ],
)
def test_positions_and_mask_that_contradict_each_other_are_refused(positions, mask, message):
    with pytest.raises(PadfreeError, match=message):
        read_tensors(torch.tensor([positions]), torch.tensor([mask]))


def test_agreement_is_checked_without_a_sync():
    sequences = PackedSequences.from_lengths([2, 2])
    with SyncCounter() as syncs:
        good, bad = (agrees(row(*values), sequences) for values in ((0, 1, 0, 1), (0, 1, 2, 3)))
    assert syncs.total == 0
    assert good
    assert not bad


@pytest.mark.parametrize(
    ("positions", "packed"),
    [
        ([1, 1, 1, 0, 1, 2], False),  # generate, padded left, with a mask that is no 2-D one
        ([1, 1, 8, 9, 10, 11], False),  # its second turn
        ([1, 1, 1, 0, 1, 0], True),
        ([0, 1, 2, 0, 1, 2], True),
        ([3, 4, 5, 6, 7, 8], False),
    ],
)
def test_positions_of_left_padding_are_not_packed_even_without_its_mask(positions, packed):
    assert bool(read_tensors(row(*positions), None, left_padded=True)) is packed
