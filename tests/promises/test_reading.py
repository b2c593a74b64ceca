"""Promises 2 and 3: what a batch says in masks of pairs, in jumps and in odd dtypes is done, said, or upstream's."""

from __future__ import annotations

import warnings

import pytest
import torch

from padfree_patch import PackedSequences, apply
from padfree_patch.registry import registry
from padfree_patch.testing import conformance, examples, pack, tiny_model

pytestmark = pytest.mark.versions

LENGTHS = (3, 4, 2)
BATCH = pack(examples(LENGTHS))
SEGMENTS = torch.tensor([1, 2, 3]).repeat_interleave(torch.tensor(LENGTHS))
BLOCKS = ((SEGMENTS[:, None] == SEGMENTS) & torch.ones(9, 9, dtype=torch.bool).tril())[None, None]
CAUSAL = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()


@pytest.fixture
def plain(make):
    return make()


@pytest.fixture
def patched(make):
    return apply(make())


def hidden(keep, dtype=torch.float32):
    """Returns a mask to add, as LLaMA-Factory's collator makes it."""
    return torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)


def result(model, **batch):
    """Returns logits and, with labels, the loss; or the error, as upstream words it."""
    try:
        output = model(use_cache=False, **batch)
    except Exception as error:
        return repr(error)
    return output.logits if output.loss is None else torch.cat([output.logits.flatten(), output.loss[None]])


def loss_alone(model):
    """Returns the mean loss of all predicted tokens, each example alone through an unpatched model."""
    losses = [model(input_ids=each, labels=each).loss * (each.shape[1] - 1) for each in examples(LENGTHS)]
    return sum(losses) / (sum(LENGTHS) - len(LENGTHS))


@pytest.mark.parametrize("form", [hidden, lambda keep: keep], ids=["added", "bool"])
def test_block_causal_mask_of_the_positions_is_served_as_a_packed_row(make, plain, patched, form):
    batch = {**BATCH, "attention_mask": form(BLOCKS), "labels": BATCH["input_ids"]}
    with torch.no_grad():
        found = patched(**batch)
        conformance.assert_logits_close(found.logits, conformance.logits_alone(make, examples(LENGTHS)))
        torch.testing.assert_close(found.loss, loss_alone(plain), rtol=1e-5, atol=0)
        for model in (patched, patched.model):  # the control: what it costs is a packed row's, whose weights are none
            with pytest.raises(ValueError, match="output_attentions of a packed batch"):
                model(**{name: batch[name] for name in batch if name != "labels"}, output_attentions=True)


def test_a_window_applies_under_a_block_causal_mask_too():
    """Upstream adds no window to a mask of the caller's (the control); the row is served as packed."""
    plain = tiny_model(registry().get("mistral"), "eager", sliding_window=3)
    batch = {**BATCH, "attention_mask": hidden(BLOCKS)}
    with torch.no_grad():
        upstream = result(plain, **batch)
        alone = conformance.logits_alone(lambda: plain, examples(LENGTHS))
        conformance.assert_logits_close(apply(plain)(**batch).logits, alone)
    assert isinstance(upstream, str) or (upstream - alone).abs().max() > 0.01


def tree():
    """Returns positions and mask of a prefix of three tokens that two branches go on from."""
    keep = CAUSAL.clone()
    keep[..., 6:, 3:6] = False
    return torch.tensor([[0, 1, 2, 3, 4, 5, 3, 4, 5]]), keep


@pytest.mark.parametrize("form", [hidden, lambda keep: keep, lambda keep: keep.float()], ids=["added", "bool", "0/1"])
@pytest.mark.parametrize(
    ("positions", "keep"),
    [
        tree(),
        (BATCH["position_ids"], CAUSAL),
        (BATCH["position_ids"], BLOCKS | BLOCKS.transpose(2, 3)),
        (torch.tensor([[0, 1, 2, 3, 3, 3, 3, 3, 3]]), CAUSAL),
    ],
    ids=["tree", "causal", "bidirectional", "standing still"],
)
def test_any_other_mask_of_pairs_goes_straight_through(plain, patched, positions, keep, form):
    batch = {"input_ids": BATCH["input_ids"], "position_ids": positions, "attention_mask": form(keep)}
    for labels in ({}, {"labels": BATCH["input_ids"]}):
        with torch.no_grad():
            found, expected = (result(model, **batch, **labels) for model in (patched, plain))
        assert found == expected if isinstance(expected, str) else torch.equal(found, expected)


def test_a_jump_ahead_is_said_once_with_its_place_and_what_to_do(patched):
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 50, 51, 52]])
    with pytest.warns(UserWarning) as caught:
        for mask in (None, torch.ones_like(positions)):
            patched(input_ids=BATCH["input_ids"], position_ids=positions, attention_mask=mask)
    (said,) = (str(each.message) for each in caught if "jumps ahead" in str(each.message))
    assert "in row 0 the position jumps ahead from 5 (token 5) to 50 (token 6)" in said
    assert "read as an end: PackedSequences(2 sequences, 9 tokens, longest 6)" in said
    assert "PackedSequences.from_lengths" in said and "segment numbers" in said


@pytest.mark.parametrize("rows", [1, 2], ids=["one text", "two texts"])
def test_lengths_and_segment_numbers_win_over_jumps(plain, patched, rows):
    text = BATCH["input_ids"]
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 50, 51, 52]])
    with torch.no_grad():
        alone = result(plain, input_ids=text, position_ids=positions, attention_mask=torch.ones_like(text))
        if isinstance(alone, str):
            pytest.skip(f"upstream can't: {alone}")
        batch = {"input_ids": text.repeat(1, rows), "position_ids": positions.repeat(1, rows)}
        says = [{"packed_sequences": PackedSequences.from_lengths([9] * rows)}]
        says += [{"attention_mask": torch.arange(1, 3).repeat_interleave(9)[None]}] if rows == 2 else []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for said in says:
                conformance.assert_logits_close(patched(**batch, **said).logits, alone.repeat(1, rows, 1))


def hand_on_copies(module, args, kwargs):
    return args, {**kwargs, "position_ids": kwargs["position_ids"].clone()}


def test_what_wins_over_a_jump_is_not_lost_on_the_way_to_the_decoder(plain, patched):
    """The head takes it out of the call, and the decoder is handed a copy of the positions, as some hooks do."""
    text, positions = BATCH["input_ids"], torch.tensor([[0, 1, 2, 3, 4, 5, 50, 51, 52]])
    ones = torch.ones_like(text)
    with torch.inference_mode():
        alone = result(plain, input_ids=text, position_ids=positions, attention_mask=ones)
        if isinstance(alone, str):
            pytest.skip(f"upstream can't: {alone}")
        lengths = {"packed_sequences": PackedSequences.from_lengths([9])}
        for copies in (False, True):
            if copies:
                patched.model.register_forward_pre_hook(hand_on_copies, with_kwargs=True)
            for said in (lengths, {**lengths, "attention_mask": ones}, {"attention_mask": ones + 1}):
                found = patched(input_ids=text, position_ids=positions, **said).logits
                conformance.assert_logits_close(found, alone)
        with pytest.warns(UserWarning, match="jumps ahead"):  # the control: of the positions alone it is two texts
            cut = patched(input_ids=text, position_ids=positions).logits
    assert (cut - alone).abs().max() > 0.01


def test_positions_and_labels_of_bytes_are_right(make, plain, patched):
    batch = {"input_ids": BATCH["input_ids"], "position_ids": BATCH["position_ids"].to(torch.uint8)}
    with torch.no_grad():
        found = patched(**batch, labels=BATCH["input_ids"].to(torch.uint8))
        conformance.assert_logits_close(found.logits, conformance.logits_alone(make, examples(LENGTHS)))
        torch.testing.assert_close(found.loss, loss_alone(plain), rtol=1e-5, atol=0)
