"""Positions that jump ahead end an example, unless lengths or segment numbers say that it goes on."""

from __future__ import annotations

import pytest
import torch

from padfree_patch import DataCollatorForCompletionOnlyLM, DataCollatorWithFlattening, PackedSequences, PadfreeError
from padfree_patch.batch.boundaries import Jump
from padfree_patch.batch.packed_batch import read_batch

POSE = torch.tensor([[0, 1, 2, 3, 4, 50, 51, 52]])
TWO = torch.cat([POSE, POSE], 1)


def read(positions, mask=None, **lengths):
    shape, device = tuple(positions.shape), torch.device("cpu")
    return read_batch(shape, device, position_ids=positions, attention_mask=mask, lengths=lengths)


@pytest.mark.parametrize("mask", [None, torch.ones_like(POSE)])
def test_a_jump_is_an_end_and_is_known_to_be_one_of_two_readings(mask):
    found = read(POSE, mask)
    assert found.sequences.lengths == (5, 3)
    assert found.jump == Jump(row=0, token=4, before=4, after=50)


@pytest.mark.parametrize(
    ("positions", "mask"),
    [
        ([0, 1, 2, 0, 1, 2, 3, 0], None),
        ([5, 6, 0, 1, 0, 0, 3, 4], [1, 1, 1, 1, 1, 0, 1, 1]),  # padding stands there
        ([0, 1, 2, 7, 8, 9, 0, 1], [1, 1, 1, 2, 2, 2, 3, 3]),  # segment numbers say the same
    ],
)
def test_what_restarts_or_is_said_otherwise_is_no_jump(positions, mask):
    found = read(torch.tensor([positions]), None if mask is None else torch.tensor([mask]))
    assert found is not None and found.jump is None


@pytest.mark.parametrize(
    "said",
    [
        {"packed_sequences": PackedSequences.from_lengths([8, 8])},
        {"cu_seq_lens_q": torch.tensor([0, 8, 16])},
        {"seq_idx": torch.tensor([[0] * 8 + [1] * 8])},
        {"mask": torch.tensor([[1] * 8 + [2] * 8])},
    ],
)
def test_lengths_and_segment_numbers_win(said):
    found = read(TWO, **said)
    assert found.sequences.lengths == (8, 8)
    assert found.jump is None and found.steps_by_one is False
    assert torch.equal(found.position_ids, TWO)


def test_one_text_whose_lengths_say_so_is_not_left_to_upstream_which_would_cut_it():
    found = read(POSE, packed_sequences=PackedSequences.from_lengths([8]))
    assert found.sequences.lengths == (8,)
    assert read(torch.arange(8)[None], packed_sequences=PackedSequences.from_lengths([8])) is None


def test_positions_that_float32_rounds_go_up():
    """float64 counts to 2^53, float32 only to 2^24."""
    positions = torch.arange(2**24 - 3, 2**24 + 5, dtype=torch.float64)[None]
    assert read(positions, packed_sequences=PackedSequences.from_lengths([8])) is None


@pytest.mark.parametrize("said", [{"cu_seq_lens_q": torch.tensor([0, 8])}, {"mask": torch.full((1, 8), 2)}])
@pytest.mark.parametrize("positions", [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 3, 4, 5, 6]])
def test_positions_that_go_back_where_an_example_goes_on_are_a_contradiction(positions, said):
    with pytest.raises(PadfreeError, match="disagree"):
        read(torch.tensor([positions]), **said)


def test_collator_refuses_positions_that_it_would_lose():
    example = {"input_ids": list(range(8)), "position_ids": POSE[0].tolist()}
    with pytest.raises(PadfreeError, match="example 0: position_ids jump ahead from 4 to 50 after token 4"):
        DataCollatorWithFlattening()([example])
    assert DataCollatorWithFlattening()([{**example, "seq_lengths": [5, 3]}])["position_ids"].tolist() == [
        [0, 1, 2, 3, 4, 0, 1, 2]
    ]


def test_collator_keeps_positions_that_are_named_a_field_of_tokens():
    example = {"input_ids": list(range(8)), "position_ids": POSE[0].tolist(), "seq_lengths": [8]}
    collator = DataCollatorWithFlattening(token_fields=["position_ids"], return_flash_attn_kwargs=True)
    batch = collator([example, example])
    assert torch.equal(batch["position_ids"], TWO)
    assert read(batch["position_ids"], packed_sequences=batch["packed_sequences"]).sequences.lengths == (8, 8)
    padded = DataCollatorWithFlattening(token_fields=["position_ids"], pad_to_multiple_of=24)([example, example])
    assert padded["position_ids"].tolist() == [[*TWO[0].tolist(), *range(8)]]
    assert read(padded["position_ids"], packed_sequences=padded["packed_sequences"]).sequences.lengths == (8, 8, 8)


def test_completions_keep_positions_that_are_named_a_field_of_tokens():
    example = {"input_ids": [1, 9, *range(2, 8)], "position_ids": POSE[0].tolist(), "seq_lengths": [8]}
    collator = DataCollatorForCompletionOnlyLM([9], padding_free=True, token_fields=["position_ids"])
    assert torch.equal(collator([example, example])["position_ids"], TWO)
    with pytest.raises(PadfreeError, match="example 0: position_ids jump ahead"):
        DataCollatorForCompletionOnlyLM([9], padding_free=True)([example])
