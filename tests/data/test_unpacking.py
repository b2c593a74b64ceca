"""What a packed batch gives back per example is what each example gives alone."""

from __future__ import annotations

import pytest
import torch

from padfree_patch import PackedSequences, PadfreeError, applied, last_tokens, sequence_log_probs, unpack
from padfree_patch.testing import examples, pack

LENGTHS = (5, 1, 9)


@pytest.fixture
def outputs(make):
    """A packed batch's logits, its sequences, and the logits of each example alone."""
    model = make()
    alone = [model(input_ids=ids).logits[0] for ids in examples(LENGTHS)]
    batch = pack(examples(LENGTHS))
    with applied(model):
        return model(**batch).logits, PackedSequences.from_position_ids(batch["position_ids"]), alone


def test_unpack_gives_each_example_its_own(outputs):
    logits, sequences, alone = outputs
    assert [len(each) for each in unpack(logits, sequences)] == list(LENGTHS)
    for packed in (logits, logits[0]):
        for found, expected in zip(unpack(packed, sequences), alone):
            torch.testing.assert_close(found, expected)


def test_last_tokens_pool_each_example(outputs):
    logits, sequences, alone = outputs
    torch.testing.assert_close(last_tokens(logits, sequences), torch.stack([each[-1] for each in alone]))
    last_tokens(logits, sequences).sum().backward()


def test_rows_of_a_batch_are_unpacked_too():
    sequences = PackedSequences.from_position_ids(torch.tensor([[0, 1, 0], [0, 0, 1]]))
    found = unpack(torch.tensor([[1, 2, 3], [4, 5, 6]]), sequences)
    assert [each.tolist() for each in found] == [[1, 2], [3], [4], [5, 6]]


def test_log_probs_are_those_of_each_example_alone(outputs):
    logits, sequences, alone = outputs
    ids = torch.cat(examples(LENGTHS), dim=1)
    labels = ids.clone()
    labels[0, 7] = -100  # the second token of the last example
    found = sequence_log_probs(logits, labels, sequences)
    for i, (each, of_labels) in enumerate(zip(alone, labels[0].split(LENGTHS))):
        expected = sum(each[t].log_softmax(-1)[of_labels[t + 1]] for t in range(len(each) - 1) if of_labels[t + 1] >= 0)
        torch.testing.assert_close(found[i], found.new_tensor(float(torch.as_tensor(expected).detach())))


def test_other_numbers_of_tokens_are_errors():
    with pytest.raises(PadfreeError, match=r"2 sequences, 5 tokens.* don't fit something of shape \(1, 4\)"):
        unpack(torch.zeros(1, 4), PackedSequences.from_lengths([2, 3]))


def test_rows_of_a_single_token_are_rows():
    logits, labels = torch.randn(3, 1, 7), torch.zeros(3, 1, dtype=torch.int64)
    sequences = PackedSequences.from_lengths([1, 1, 1])
    assert last_tokens(logits, sequences).shape == (3, 7)
    assert sequence_log_probs(logits, labels, sequences).tolist() == [0, 0, 0]
    with pytest.raises(PadfreeError, match=r"found \(3, 7\) and \(3, 1\)"):
        sequence_log_probs(logits[:, 0], labels, sequences)


def test_a_batch_of_one_token_is_a_row():
    """The control: several tokens with a value each are no rows of one token."""
    one = PackedSequences.from_lengths([1])
    assert [each.tolist() for each in unpack(torch.tensor([[7]]), one)] == [[7]]
    assert last_tokens(torch.tensor([[7]]), one).tolist() == [7]
    assert unpack(torch.zeros(2, 1), PackedSequences.from_lengths([1, 1]))[0].shape == (1, 1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_may_be_of_any_dtype_of_integers(dtype):
    logits, labels, sequences = torch.randn(1, 3, 7), torch.tensor([[1, 2, 3]]), PackedSequences.from_lengths([2, 1])
    expected = sequence_log_probs(logits, labels, sequences)
    assert torch.equal(sequence_log_probs(logits, labels.to(dtype), sequences), expected)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda sequences: unpack([1, 2], sequences), "what is unpacked must be a tensor, found list"),
        (lambda _: unpack(torch.zeros(1, 2), [2]), "sequences must be PackedSequences, found list: take the batch's"),
        (lambda _: last_tokens(torch.zeros(1, 2), None), "sequences must be PackedSequences, found NoneType"),
        (lambda sequences: unpack(torch.tensor(1), sequences), r"don't fit something of shape \(\)"),
        (lambda each: sequence_log_probs(torch.zeros(1, 2, 5), [[1, 2]], each), "labels must be a tensor, found list"),
        (
            lambda each: sequence_log_probs(torch.zeros(1, 2, 5), torch.tensor([[1.0, 2.0]]), each),
            "labels must be integers, found float32",
        ),
        (
            lambda each: sequence_log_probs(torch.zeros(1, 2, 5), torch.tensor([[1, 9]]), each),
            "a label is outside of the vocabulary of 5",
        ),
    ],
)
def test_what_cannot_be_unpacked_is_an_error(use, message):
    with pytest.raises(PadfreeError, match=message):
        use(PackedSequences.from_lengths([2]))
