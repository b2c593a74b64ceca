"""A mask of tokens by tokens means that the caller isolates; one that only shows where examples end is read as that."""

from __future__ import annotations

import pytest
import torch

from padfree_patch import PackedSequences, PadfreeError
from padfree_patch.batch.packed_batch import read_batch

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]])
LENGTHS = (3, 4, 2)
BY_LENGTHS = {"packed_sequences": PackedSequences.from_lengths(LENGTHS)}


def block_causal(*lengths, padding=0):
    """Returns bool (1, 1, T, T); padding at the end sees nothing."""
    numbers = torch.arange(1, len(lengths) + 1).repeat_interleave(torch.tensor(lengths))
    numbers = torch.cat([numbers, torch.zeros(padding, dtype=torch.int64)])
    same = (numbers[:, None] == numbers) & (numbers != 0)
    return (same & torch.ones_like(same).tril())[None, None]


def added(keep, value, dtype=torch.float32):
    return torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, value)


FORMS = {
    "bool": lambda keep: keep,
    "0/1": lambda keep: keep.long(),
    "0/1 floating": lambda keep: keep.half(),
    "least float32": lambda keep: added(keep, torch.finfo(torch.float32).min),
    "least bfloat16": lambda keep: added(keep, torch.finfo(torch.bfloat16).min, torch.bfloat16),
    "minus infinity": lambda keep: added(keep, -torch.inf),
    "minus 10^9": lambda keep: added(keep, -1e9),
}


def read(mask, positions=POSITIONS, **lengths):
    return read_batch((1, 9), torch.device("cpu"), position_ids=positions, attention_mask=mask, lengths=lengths)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_block_causal_mask_of_the_positions_is_a_packed_row(form):
    for given in ({}, BY_LENGTHS):
        found = read(form(block_causal(*LENGTHS)), **given)
        assert found.sequences.lengths == LENGTHS and found.jump is None
    padded = read(form(block_causal(3, 4, padding=2)))
    assert padded.sequences.lengths == LENGTHS


def without(mask, query, key):
    changed = mask.clone()
    changed[0, 0, query, key] = False
    return changed


OTHERS = {
    "causal over all": block_causal(9),
    "other blocks": block_causal(4, 3, 2),
    "one token less": without(block_causal(*LENGTHS), 5, 3),
    "bidirectional": block_causal(*LENGTHS) | block_causal(*LENGTHS).transpose(2, 3),
    "everything": torch.ones(1, 1, 9, 9, dtype=torch.bool),
    "nothing": torch.zeros(1, 1, 9, 9, dtype=torch.bool),
    "two heads": block_causal(*LENGTHS).expand(1, 2, 9, 9),
    "more keys": torch.cat([block_causal(*LENGTHS)] * 2, 3),
}


@pytest.mark.parametrize("form", ["bool", "0/1", "least float32"])
@pytest.mark.parametrize("mask", OTHERS.values(), ids=OTHERS)
def test_any_other_mask_means_that_the_caller_isolates_unless_lengths_were_given(mask, form):
    mask = FORMS[form](mask)
    assert read(mask) is None
    with pytest.raises(PadfreeError, match=r"the batch is packed, but its attention_mask is \("):
        read(mask, **BY_LENGTHS)


SQUARE, OF_TOKENS = torch.ones(1, 1, 9, 9), torch.ones(1, 1, 1, 9)


@pytest.mark.parametrize("mask", [{"full": SQUARE, "sliding": SQUARE}, {"full": object()}, torch.ones(1, 2, 9, 12)])
def test_masks_of_pairs_of_other_kinds_go_to_upstream_too(mask):
    assert read(mask) is None


@pytest.mark.parametrize("lengths", [{}, BY_LENGTHS], ids=["positions", "lengths"])
@pytest.mark.parametrize(
    "mask",
    [
        *(torch.ones(9), torch.ones(9, dtype=torch.bool), torch.tensor(True), torch.ones(1, 1, 9), torch.ones(1, 9, 9)),
        *(OF_TOKENS, OF_TOKENS * 0, OF_TOKENS.mT, torch.ones(1, 1, 9, 8), torch.ones(1, 1, 1, 9, 9)),
        *({"full": None}, {"full": SQUARE, "sliding": None}, {"full": torch.ones(1, 9)}, {}),
        *([[1] * 9], OF_TOKENS.numpy()),
    ],
    ids=lambda mask: str(tuple(mask.shape) if hasattr(mask, "shape") else mask)[:30],
)
def test_masks_that_tell_no_example_from_the_next_are_refused_beside_several(mask, lengths):
    """The controls: beside positions of one text, or of left padding, they are upstream's."""
    with pytest.raises(PadfreeError, match="the batch is packed, but its attention_mask is"):
        read(mask, **lengths)
    for positions in (torch.arange(9), torch.tensor([1, 1, 0, 1, 2, 3, 4, 5, 6])):
        assert read(mask, positions[None]) is None


@pytest.mark.parametrize("mask", [torch.ones(9), torch.ones(1, 1, 9), torch.ones(1, 8), torch.ones(2, 9)])
@pytest.mark.parametrize("positions", [None, POSITIONS, torch.arange(9)[None]])
def test_segment_numbers_of_another_shape_are_refused_whatever_the_positions(mask, positions):
    mask[..., 4:] = 2
    with pytest.raises(PadfreeError, match=r"attention_mask holds segment numbers of shape \(.*\) for \(1, 9\)"):
        read(mask, positions)


def test_a_bias_on_keys_is_no_segment_number():
    assert read(OF_TOKENS * 3, torch.arange(9)[None]) is None


@pytest.mark.parametrize(
    "positions",
    [None, torch.arange(9)[None], POSITIONS / 2, POSITIONS > 0, POSITIONS[0], POSITIONS.repeat(3, 1)[:, None]],
)
def test_positions_that_do_not_say_the_same_are_upstreams_business(positions):
    assert read(block_causal(*LENGTHS), positions) is None


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_masks_of_any_dtype_are_looked_at(dtype):
    found = read(block_causal(*LENGTHS).to(dtype))
    assert (found is None) == dtype.is_complex


def test_a_bias_that_hides_nothing_is_no_mask_of_ours():
    assert read(added(block_causal(*LENGTHS), -3.0)) is None


def test_left_padding_is_no_second_example():
    """Positions and mask of generate: 1,1,0,1,2,... where the first two tokens see nothing."""
    mask = block_causal(2, 7)
    mask[:, :, :2] = False
    assert read(mask, torch.tensor([[1, 1, 0, 1, 2, 3, 4, 5, 6]])) is None


def test_rows_of_a_batch_are_each_looked_at():
    positions = torch.cat([POSITIONS, torch.arange(9)[None]])
    device = torch.device("cpu")
    for second, expected in ((block_causal(9), (*LENGTHS, 9)), (block_causal(*LENGTHS), None)):
        masks = torch.cat([block_causal(*LENGTHS), second])
        found = read_batch((2, 9), device, position_ids=positions, attention_mask=masks, lengths={})
        assert (found.sequences.lengths if found else None) == expected
