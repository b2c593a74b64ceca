"""Callers' tensors are read in every forward: what was read of them may have changed without a trace."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers.elsewhere import elsewhere
from padfree_patch import apply
from padfree_patch.batch.cache import own_key
from padfree_patch.batch.packed_batch import known_batches, read_batch
from padfree_patch.testing import SyncCounter, conformance, examples, pack

CHANGES = {
    "data": lambda tensor, other: tensor.data.copy_(other),
    "dlpack": lambda tensor, other: torch.from_dlpack(tensor.as_subclass(torch.Tensor)).copy_(other),
    "storage": lambda tensor, other: tensor.untyped_storage().copy_(other.untyped_storage()),
    "numpy": lambda tensor, other: tensor.as_subclass(torch.Tensor).numpy().__setitem__(..., other.numpy()),
}


def read(positions, mask=None):
    return read_batch((1, 6), torch.device("cpu"), position_ids=positions, attention_mask=mask, lengths={})


@pytest.mark.parametrize("change", CHANGES)
def test_positions_that_change_without_a_trace_are_read_again(change):
    positions = elsewhere(pack(examples((2, 4)))["position_ids"])
    assert read(positions).sequences.lengths == (2, 4)
    key = own_key(positions)
    CHANGES[change](positions, pack(examples((3, 3)))["position_ids"])
    assert own_key(positions) == key, "the control: by its key it is the same tensor"
    assert read(positions).sequences.lengths == (3, 3)


@pytest.mark.parametrize("change", CHANGES)
def test_masks_that_change_without_a_trace_are_read_again(change):
    mask = elsewhere(torch.tensor([[1, 1, 2, 2, 2, 2]]))
    assert read(None, mask).sequences.lengths == (2, 4)
    CHANGES[change](mask, torch.tensor([[1, 1, 1, 2, 2, 2]]))
    assert read(None, mask).sequences.lengths == (3, 3)
    CHANGES[change](mask, torch.tensor([[1, 1, 1, 1, 1, 1]]))
    assert read(None, mask) is None


def test_a_model_sees_what_the_callers_tensor_holds_now(llama):
    model = apply(copy.deepcopy(llama))
    (ids,) = examples((6,))
    mask = elsewhere(torch.ones_like(ids))
    for lengths in ((2, 4), (3, 3), (1, 5)):
        mask.data.copy_(torch.tensor([1, 2]).repeat_interleave(torch.tensor(lengths)))
        with torch.no_grad():
            found = model(input_ids=ids, attention_mask=mask).logits
            alone = [llama(input_ids=each).logits for each in ids.split(lengths, dim=1)]
        conformance.assert_logits_close(found, torch.cat(alone, dim=1))


def test_only_our_own_tensors_are_found_again():
    known_batches.clear()
    positions = pack(examples((2, 4)))["position_ids"]
    batch = read(positions)
    assert known_batches.find(own_key(positions)) is not batch
    assert read(batch.position_ids) is batch


def test_a_head_and_its_decoder_read_an_ordinary_batch_once(llama):
    """The control is a call of the decoder after its mask was written to: it is read again."""
    batch = {"input_ids": torch.cat(examples((6,))), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])}
    counts = []
    for prepare in (lambda model: None, apply, write_to_the_mask_in_between):
        model = copy.deepcopy(llama)
        prepare(model)
        with SyncCounter() as syncs, torch.no_grad():
            model(**batch)
        counts.append(syncs.by_name["cpu"])
    assert [count - counts[0] for count in counts] == [0, 1, 2]  # 4.36 reads the mask itself


def write_to_the_mask_in_between(model) -> None:
    apply(model)
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "attention_mask": kwargs["attention_mask"].add_(0)}),
        with_kwargs=True,
    )
