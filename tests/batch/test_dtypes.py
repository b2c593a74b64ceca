"""Whatever the dtype of positions, masks and labels: read for what upstream takes them for, or refused by name."""

from __future__ import annotations

import pytest
import torch

from padfree_patch import PackedSequences, PadfreeError
from padfree_patch.batch.labels import ignore_first_labels
from padfree_patch.batch.packed_batch import read_batch

WHOLE = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
FLOATING = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LENGTHS = (3, 4, 2)
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]])
SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 3, 3]])


def read(positions=None, mask=None, **lengths):
    (rows, tokens) = (positions if positions is not None else mask).shape
    device = torch.device("cpu")
    return read_batch((rows, tokens), device, position_ids=positions, attention_mask=mask, lengths=lengths)


@pytest.mark.parametrize("dtype", WHOLE + FLOATING, ids=str)
def test_positions_and_masks_are_read_whatever_their_dtype(dtype):
    ones = torch.ones_like(POSITIONS)
    for given in (
        {"positions": POSITIONS.to(dtype)},
        {"mask": SEGMENTS.to(dtype)},
        {"positions": POSITIONS, "mask": ones.to(dtype)},
        {"positions": POSITIONS.to(dtype), "mask": ones},
        {"positions": POSITIONS.to(dtype), "mask": SEGMENTS.to(dtype)},
        {"positions": POSITIONS.to(dtype), "cu_seq_lens_q": torch.tensor([0, 3, 7, 9])},
    ):
        found = read(**given)
        assert found.sequences.lengths == LENGTHS
        assert torch.equal(found.position_ids, POSITIONS)
    assert read(mask=ones.to(dtype)) is None
    assert PackedSequences.from_position_ids(POSITIONS.to(dtype)).lengths == LENGTHS
    assert PackedSequences.from_attention_mask(SEGMENTS.to(dtype)).lengths == LENGTHS


@pytest.mark.parametrize("dtype", WHOLE + FLOATING, ids=str)
def test_an_example_of_as_many_tokens_as_the_dtype_counts_does_not_mix_with_the_next(dtype):
    """uint8: 255 + 1 is 0; bfloat16: 257 is 256."""
    limit = 2 / torch.finfo(dtype).eps if dtype.is_floating_point else torch.iinfo(dtype).max + 1
    if limit > 2**16:
        return
    length = int(limit)
    positions = torch.cat([torch.arange(length), torch.arange(3)])[None]
    try:
        assert read(positions.to(dtype)).sequences.lengths == (length, 3)
    except PadfreeError as refusal:
        assert str(dtype).removeprefix("torch.") in str(refusal)
    longer = torch.cat([torch.arange(length + 5), torch.arange(3)])[None]
    with pytest.raises(PadfreeError, match=f"position_ids.*{str(dtype).removeprefix('torch.')} can't"):
        read(longer.to(dtype))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"positions": POSITIONS / 2}, r"position_ids: 0.5 \(row 0, token 1\), which is not a whole number"),
        ({"positions": POSITIONS * float("nan")}, r"position_ids: nan \(row 0, token 0\)"),
        ({"positions": POSITIONS > 0}, "position_ids must be integers, found bool"),
        ({"positions": POSITIONS, "mask": SEGMENTS / 4 + 0.25}, r"attention_mask of a packed batch: 0.5 \(row 0"),
        ({"positions": POSITIONS, "mask": SEGMENTS * 0 - 1}, "attention_mask of a packed batch: -1"),
        ({"positions": POSITIONS, "mask": SEGMENTS * float("nan")}, "attention_mask of a packed batch: nan"),
        ({"mask": SEGMENTS / 2}, r"attention_mask: 0.5 \(row 0, token 0\), which is not a whole number"),
        ({"mask": SEGMENTS - 2}, None),
        ({"mask": (SEGMENTS - 2) * 2}, "attention_mask holds -2"),
        ({"mask": (SEGMENTS + 255).bfloat16()}, r"attention_mask: 256 .* bfloat16 can't tell from the next number"),
    ],
)
def test_values_that_mean_nothing_are_refused_by_name(given, message):
    if message is None:
        assert read(**given) is None
        return
    with pytest.raises(PadfreeError, match=message):
        read(**given)


def test_fractional_positions_are_kept_where_something_else_says_the_boundaries():
    halves = POSITIONS / 2
    for given in ({"mask": SEGMENTS}, {"packed_sequences": PackedSequences.from_lengths(LENGTHS)}):
        found = read(halves, **given)
        assert found.sequences.lengths == LENGTHS
        assert torch.equal(found.position_ids, halves)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.5])
@pytest.mark.parametrize("positions", [None, POSITIONS.repeat(2, 1)])
def test_a_value_that_means_nothing_does_not_hide_segment_numbers(positions, value):
    """The largest of values among which is NaN is NaN, which is not above 1."""
    mask = torch.cat([SEGMENTS, SEGMENTS * 0 + 1]).float()
    mask[1, 5] = value
    with pytest.raises(PadfreeError, match=rf"attention_mask: {value} \(row 1, token 5\)"):
        read(positions, mask)


def test_an_ordinary_mask_of_halves_is_upstreams():
    assert read(torch.arange(9)[None], SEGMENTS / 4 + 0.25) is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.complex64], ids=str)
def test_numbers_of_sequences_that_are_no_integers_are_refused(dtype):
    numbers = (SEGMENTS - 1).to(dtype)
    if dtype == torch.float32:
        assert read(POSITIONS, seq_idx=numbers).sequences.lengths == LENGTHS
        numbers = numbers + 0.5
    with pytest.raises(PadfreeError, match=r"seq_idx|complex64"):
        read(POSITIONS, seq_idx=numbers)


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
def test_labels_at_boundaries_are_ignored_whatever_their_dtype(dtype):
    labels = torch.arange(10, 19, dtype=dtype)[None]
    found = ignore_first_labels(labels, PackedSequences.from_lengths(LENGTHS))
    assert found.tolist() == [[-100, 11, 12, -100, 14, 15, 16, -100, 18]]
    assert labels[0, 0] == 10


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_labels_that_are_no_integers_are_refused(dtype):
    with pytest.raises(PadfreeError, match="labels must be integers, found"):
        ignore_first_labels(torch.ones(1, 9, dtype=dtype), PackedSequences.from_lengths(LENGTHS))
