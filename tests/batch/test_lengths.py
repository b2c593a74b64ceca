"""Lengths beside the tokens check themselves, cannot be changed, and may be padded where shapes must stay the same."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from helpers.elsewhere import elsewhere
from padfree_patch import PackedSequences, PadfreeError, last_tokens
from padfree_patch.batch.labels import ignore_first_labels
from padfree_patch.batch.lengths import sequences_of
from padfree_patch.batch.packed_batch import PackedBatch, read_batch
from padfree_patch.testing import SyncCounter

CU = torch.tensor([0, 3, 7, 9])
LENGTHS = (3, 4, 2)
NUMBERS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]])


def read(positions=None, **lengths):
    return read_batch((1, 9), torch.device("cpu"), position_ids=positions, attention_mask=None, lengths=lengths)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.tensor([0, 0, 9]), 9, 9), "sequence 0 has length 0"),  # which killed the process
        ((CU, 4, 9, (3, 0, 4, 2)), "sequence 1 has length 0"),
        ((CU, 4, 9, (4, 3, 2)), r"cu_seqlens do not hold the lengths \(4, 3, 2\)"),
        ((CU, 4, 9, None, 3), "padding is 3 tokens, but the last sequence has 2"),
        ((CU, 2, 9), "max_length is 2, but the longest sequence has 4"),
        ((CU, 4, 10), "cover 9 tokens, but the batch has 10"),
        ((torch.tensor([0, -3, 9]), 9, 9), "sequence 0 has length -3"),
        ((torch.tensor([[0, 3], [0, 9]]), 9, 9), r"must be integers \(sequences \+ 1,\), found torch.int64 \(2, 2\)"),
        ((None, 9, 9), "must be integers, found None"),
        ((CU, "4", 9), "max_seqlen must be a whole number, found '4'"),
        ((CU, 4, torch.tensor([9, 9])), "total must be a whole number"),
        ((CU, 4, 9, None, [2]), "padding must be a whole number"),
    ],
)
def test_sequences_that_contradict_themselves_cannot_be_made(arguments, message):
    with pytest.raises(PadfreeError, match=message):
        PackedSequences(*arguments)


def test_sequences_that_are_made_cannot_be_changed():
    source = CU.int()
    packed = PackedSequences(source, 4, 9)
    source[1] = 5
    packed.cu_seqlens[1] = 5
    packed.cu_seqlens.numpy()[:] = 0
    for name in ("cu_seqlens", "max_seqlen", "total", "lengths"):
        with pytest.raises(AttributeError):
            setattr(packed, name, 5)
    for same in (packed, pickle.loads(pickle.dumps(packed)), copy.deepcopy(packed), packed.to("cpu")):
        assert (same.lengths, same.cu_seqlens.tolist(), same.max_seqlen, same.total) == (LENGTHS, CU.tolist(), 4, 9)


def test_padding_is_kept_whether_lengths_were_given_or_not():
    assert PackedSequences(CU, 4, 9, padding=2).padding == PackedSequences(CU, 4, 9, LENGTHS, 2).padding == 2


@pytest.mark.parametrize("lengths", [[2**31], [2**30, 2**30]])
def test_more_tokens_than_int32_counts_are_refused(lengths):
    with pytest.raises(PadfreeError, match="2147483648 tokens, more than int32 can count"):
        PackedSequences.from_lengths(lengths)


@pytest.mark.parametrize(
    "lengths", [[1.5], [float("nan")], [None], None, "12", 3, torch.tensor([3.0]), [5, True], [torch.tensor(True)]]
)
def test_lengths_that_are_no_integers_are_refused(lengths):
    with pytest.raises(PadfreeError, match="lengths must be positive integers"):
        PackedSequences.from_lengths(lengths)


@pytest.mark.parametrize("beside", [{}, {"packed_sequences": PackedSequences.from_lengths(LENGTHS)}])
@pytest.mark.parametrize(
    "numbers", [NUMBERS[None], NUMBERS[:, :8], NUMBERS.repeat(1, 2), NUMBERS.repeat(2, 1), NUMBERS[:, :0], "0, 1"]
)
def test_numbers_of_sequences_in_another_shape_are_refused(numbers, beside):
    with pytest.raises(PadfreeError, match="seq_idx"):
        read(seq_idx=numbers, **beside)
    assert read(seq_idx=NUMBERS[0], **beside).sequences.lengths == LENGTHS


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"cu_seq_lens_q": "abc"}, "cu_seqlens must be integers, found abc"),
        ({"cu_seq_lens_q": [0, None, 9]}, "cu_seqlens must be integers"),
        ({"cu_seq_lens_q": CU.float()}, "cu_seqlens must be integers"),
        ({"cu_seq_lens_q": [False, 3, 7, 9]}, "cu_seqlens must be integers.*truth values"),  # torch reads 0, 3, 7, 9
        ({"cu_seq_lens_q": CU, "max_length_q": 3.5}, "max_length_q must be an integer, found 3.5"),
        ({"cu_seq_lens_q": CU, "max_length_q": "4"}, "max_length_q must be an integer, found 4"),
        ({"cu_seq_lens_q": CU, "max_length_k": torch.tensor([4, 4])}, "max_length_k must be an integer"),
        ({"cu_seq_lens_q": CU, "max_length_q": 0}, "max_length is 0, but the longest sequence has 4"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 3, 7, 9])}, "sequence 1 has length 0"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 5, 9])}, "sequence 1 has length -4"),
        ({"cu_seq_lens_q": torch.tensor([0, 0])}, "no sequences"),
    ],
)
def test_lengths_that_make_no_sense_are_refused(lengths, message):
    with pytest.raises(PadfreeError, match=message):
        read(**lengths)


PADDED = [
    {"cu_seq_lens_q": torch.tensor([0, 3, 7, 9, 9, 9]), "max_length_q": 64},
    {"cu_seq_lens_q": torch.tensor([0, 3, 7, 9, 9, 9]), "cu_seq_lens_k": CU, "max_length_q": 64, "max_length_k": 9},
    {"cu_seq_lens_q": CU, "cu_seq_lens_k": torch.tensor([0, 3, 7, 9, 9]), "max_length_k": torch.tensor(4096)},
    {"packed_sequences": PackedSequences.from_lengths(LENGTHS), "max_length_q": 4096},
]


@pytest.mark.parametrize("lengths", PADDED)
def test_lengths_padded_by_their_last_value_and_a_maximum_that_is_a_bound_are_taken(lengths):
    found = read(**lengths)
    assert (found.sequences.lengths, found.sequences.max_seqlen) == (LENGTHS, 4)


@pytest.mark.parametrize("lengths", PADDED[:2])
def test_padded_lengths_on_a_device_are_not_read(lengths):
    """Everything that a forward asks of them is right although their number is not known."""
    there = {name: elsewhere(value) if isinstance(value, torch.Tensor) else value for name, value in lengths.items()}
    labels = torch.arange(9)[None]
    with SyncCounter() as syncs:
        packed = sequences_of(there, (1, 9), torch.device("cpu"))
        kernel = packed.kernel_cu_seqlens().tolist()
        positions, first = packed.position_ids(), ignore_first_labels(labels, packed)
        last = ignore_first_labels(labels, packed, shifted=True)
    assert kernel == [0, 3, 7, 9, 9, 9] and packed.max_seqlen == 9  # no more than there are tokens
    assert syncs.by_name == {"tolist": 1}  # this test's own
    assert positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert first.tolist() == [[-100, 1, 2, -100, 4, 5, 6, -100, 8]]
    assert last.tolist() == [[0, 1, -100, 3, 4, 5, -100, 7, -100]]
    assert last_tokens(torch.arange(9), packed).tolist() == [2, 6, 8]
    assert packed.lengths == LENGTHS and packed.cu_seqlens.tolist() == CU.tolist()
    assert PackedBatch(packed, positions[None]).last_positions == [2, 3, 1]


def test_positions_of_padding_beside_lengths_may_be_anything():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 0]])
    real = torch.tensor([[1] * 7 + [0] * 2])

    def read_beside(mask):
        given = {"position_ids": positions, "attention_mask": mask, "lengths": {"cu_seq_lens_q": CU}}
        return read_batch((1, 9), torch.device("cpu"), **given)

    assert read_beside(real).sequences.lengths == LENGTHS
    with pytest.raises(PadfreeError, match="position_ids and the given lengths disagree"):
        read_beside(torch.ones_like(real))


@pytest.mark.parametrize("cu", [[0, 3, 3, 9], [0, 9, 5, 9], [1, 3, 9], [0, 3, 8], [0, 3, 9, 3], [0, 1, 9]])
def test_lengths_on_a_device_are_checked_there(cu):
    given = {"cu_seq_lens_q": elsewhere(torch.tensor(cu)), "max_length_q": 6}
    with pytest.raises(PadfreeError, match="cu_seqlens do not fit 9 tokens with max_seqlen 6"):
        sequences_of(given, (1, 9), torch.device("cpu"))
