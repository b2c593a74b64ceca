"""Lengths beside a mask: the lengths number the tokens, the mask says which of them are padding, or says the same."""

from __future__ import annotations

import itertools

import pytest
import torch

from padfree_patch import PackedSequences, PadfreeError, apply
from padfree_patch.batch.packed_batch import read_batch
from padfree_patch.testing import SyncCounter, conformance, examples

TOKENS = 6
MASKS = list(itertools.product([0, 1], repeat=TOKENS))
CUTS = [cut for count in range(TOKENS) for cut in itertools.combinations(range(1, TOKENS), count)]


def read(lengths, mask, positions=None):
    return read_batch(
        (1, TOKENS),
        torch.device("cpu"),
        position_ids=None if positions is None else torch.tensor([positions]),
        attention_mask=torch.tensor([mask]),
        lengths={"packed_sequences": PackedSequences.from_lengths(lengths)},
    )


def runs(values):
    return tuple(len(list(group)) for _, group in itertools.groupby(values))


def expected(lengths, mask):
    """Returns what must be read, "refused" for padding between two tokens of one of several sequences."""
    numbers = [i for i, length in enumerate(lengths, 1) for _ in range(length)]
    real = [number for number, is_real in zip(numbers, mask) if is_real]
    if len(set(real)) < 2:
        return None
    alone = [number * is_real for number, is_real in zip(numbers, mask)]
    stretches = [number for number, _ in itertools.groupby(alone) if number]
    return runs(alone) if len(stretches) == len(set(stretches)) else "refused"


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_padding_at_the_ends_of_sequences_is_read_beside_their_lengths(cuts):
    """Of all 2048 pairs of lengths and masks of six tokens, 101 were read as one text."""
    lengths = [end - begin for begin, end in itertools.pairwise((0, *cuts, TOKENS))]
    for mask in MASKS:
        try:
            batch = read(lengths, mask)
            found = batch and batch.sequences.lengths
        except PadfreeError as error:
            assert "a 0 inside a sequence of a packed batch" in str(error)
            found = "refused"
        assert found == expected(lengths, mask), (lengths, mask)


@pytest.mark.parametrize("positions", [None, [0, 1, 0, 1, 2, 3], [0, 1, 0, 0, 0, 1]])
def test_an_example_that_is_padded_on_the_left_inside_a_row_is_its_own(llama, positions):
    ids = torch.cat(examples((TOKENS,)), 1)
    given = {"packed_sequences": PackedSequences.from_lengths([2, 4])}
    given["attention_mask"] = torch.tensor([[1, 1, 0, 0, 1, 1]])
    if positions is not None:
        given["position_ids"] = torch.tensor([positions])
    with torch.no_grad():
        alone = [llama(input_ids=each).logits for each in (ids[:, :2], ids[:, 4:])]
        found = apply(llama)(input_ids=ids, **given).logits
    conformance.assert_logits_close(torch.cat([found[:, :2], found[:, 4:]], 1), torch.cat(alone, 1))


@pytest.mark.parametrize(
    ("lengths", "segments", "message"),
    [
        ([6], [1, 1, 0, 0, 2, 2], "between tokens 1 and 4: segments 1, 2, but by the lengths both are of one sequence"),
        ([6], [1, 1, 1, 2, 2, 2], "between tokens 2 and 3: segments 1, 2"),
        ([4, 2], [1, 1, 0, 2, 2, 2], "between tokens 1 and 3: segments 1, 2"),
        ([2, 2, 2], [1, 1, 1, 0, 2, 2], "between tokens 1 and 2: segments 1, 1, but by the lengths another sequence"),
        ([2, 4], [2, 2, 2, 2, 2, 2], "between tokens 1 and 2: segments 2, 2"),
        ([3, 3], [2, 2, 0, 0, 2, 2], "a segment number comes back"),
    ],
)
def test_lengths_that_contradict_segment_numbers_are_refused(lengths, segments, message):
    with pytest.raises(PadfreeError, match=message):
        read(lengths, segments)


@pytest.mark.parametrize("lengths", [[2, 2, 2], [3, 3], [2, 4], [4, 2]])
def test_lengths_and_segment_numbers_may_count_padding_to_either_side(lengths):
    assert read(lengths, [1, 1, 0, 0, 2, 2]).sequences.lengths == (2, 2, 2)


@pytest.mark.parametrize("mask", [[1] * 6, [1, 1, 1, 1, 1, 0]])
def test_one_text_that_jumps_is_not_left_to_others_who_would_cut_it(mask):
    """The controls: one that does not jump is ordinary, and without lengths it is two."""
    jumps = [0, 1, 2, 50, 51, 52]
    found = read([6], mask, jumps)
    assert found.sequences.lengths == runs(mask) and found.steps_by_one is False and found.jump is None
    assert read([6], mask, range(6)) is None
    given = {"position_ids": torch.tensor([jumps]), "attention_mask": torch.tensor([mask]), "lengths": {}}
    assert read_batch((1, 6), torch.device("cpu"), **given).jump is not None


@pytest.mark.parametrize("positions", [None, [0, 1, 0, 1, 2, 3]])
def test_all_of_it_comes_to_the_host_together(positions):
    with SyncCounter() as syncs:
        read([2, 4], [1, 1, 0, 0, 1, 1], positions)
    assert syncs.by_name == {"cpu": 1, "to_cpu": 1}  # the second moves the lengths to the tokens
