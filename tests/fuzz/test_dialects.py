"""Every way of saying where examples end, right and wrong: exact, refused, or what upstream does unpatched."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

from helpers.dialects import LENGTHS, MOST_ROWS, MOST_TOKENS, Batch, Spans, batches, meaning
from helpers.fuzzing import VOCABULARY, assert_found, bounded, is_refusal, outcome, same, small_llama
from padfree_patch import apply
from padfree_patch.batch import boundaries
from padfree_patch.seams import head
from padfree_patch.testing import conformance

pytestmark = pytest.mark.fuzz

TOKENS = torch.randint(3, VOCABULARY, (MOST_ROWS * MOST_TOKENS,), generator=torch.Generator().manual_seed(0))


@functools.cache
def patched() -> Any:
    return apply(small_llama())


@functools.cache
def plain() -> Any:
    return small_llama()


def result(model: Any, batch: Batch, *, without: tuple[str, ...] = ()) -> tuple[Tensor, ...]:
    """Returns the logits of a call, the loss and the gradients of all parameters."""
    tokens = TOKENS[: batch.shape[0] * batch.shape[1]].view(batch.shape)
    said = {name: value for name, value in batch.said.items() if name not in without}
    output = model(input_ids=tokens, labels=labels_of(batch, tokens), **said)
    gradients = torch.autograd.grad(output.loss, list(model.parameters()))
    return output.logits.detach(), output.loss.detach(), *gradients


def labels_of(batch: Batch, tokens: Tensor) -> Tensor:
    """Returns the tokens as labels, except where a mask says padding, as collators do."""
    mask = batch.said.get("attention_mask")
    if mask is None or mask.shape != tokens.shape:
        return tokens
    return tokens.masked_fill(mask == 0, -100)


def alone(spans: Spans, positions: Tensor | None) -> tuple[Tensor, ...]:
    """Returns what `result` does of the sequences, each run alone through the unpatched model."""
    model, logits, losses = plain(), [], []
    for begin, end in spans:
        tokens = TOKENS[None, begin:end]
        given = {} if positions is None else {"position_ids": positions[None, begin:end]}
        logits.append(model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **given).logits[0])
        losses.append(F.cross_entropy(logits[-1][:-1], tokens[0, 1:], reduction="sum"))
    loss = sum(losses) / sum(end - begin - 1 for begin, end in spans)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat(logits).detach(), loss.detach(), *gradients


def assert_exact(found: tuple[Tensor, ...], batch: Batch, spans: Spans) -> None:
    positions = batch.said.get("position_ids")
    positions = None if positions is None else positions.expand(batch.shape).flatten()
    real = torch.cat([torch.arange(begin, end) for begin, end in spans])
    logits, *others = found
    if all(end - begin == 1 for begin, end in spans):  # nothing is predicted, so the mean loss is NaN
        others = []
        wanted = (plain_logits_of_single_tokens(spans),)
    else:
        wanted = alone(spans, positions)
    conformance.assert_logits_close(logits.flatten(0, 1)[real].nan_to_num(), wanted[0].nan_to_num())
    for one, other in zip(map(torch.nan_to_num, others), map(torch.nan_to_num, wanted[1:])):
        assert (one - other).norm() <= conformance.GRADIENT_TOLERANCE * other.norm() + 1e-6


@torch.no_grad()
def plain_logits_of_single_tokens(spans: Spans) -> Tensor:
    return torch.cat([plain()(input_ids=TOKENS[None, begin : begin + 1]).logits[0] for begin, _ in spans])


def is_packed(batch: Batch, spans: Spans) -> bool:
    """Whether a row holds several real sequences."""
    return len({begin // batch.shape[1] for begin, _ in spans}) < len(spans)


def check(batch: Batch) -> None:
    found, spans = outcome(lambda: result(patched(), batch)), meaning(batch)
    if is_refusal(found):
        assert batch.wrong, found
    elif isinstance(found, Exception):
        assert same(found, outcome(lambda: result(plain(), batch))), found
    elif spans is None or (batch.wrong and not is_packed(batch, spans)):
        unpatched = [outcome(lambda n=names: result(plain(), batch, without=n)) for names in ((), LENGTHS)]
        if not any(same(found, each) for each in unpatched):
            assert spans is not None
            assert_exact(found, batch, spans)
    else:
        assert_exact(found, batch, spans)


@bounded(150)
@given(batches())
def test_a_batch_is_exact_or_refused_or_what_upstream_does(batch):
    check(batch)


def reads_nothing(call):
    """Ignores what says where examples end, and hands everything on but the lengths."""
    for name in LENGTHS:
        call.arguments.pop(name, None)


def test_boundaries_that_are_ignored_are_found(monkeypatch):
    monkeypatch.setattr(head, "take_batch", reads_nothing)
    assert_found(batches(), check)


def test_a_boundary_that_is_off_by_one_is_found(monkeypatch):
    read = boundaries.lengths_of_segments

    def one_later(seq_idx):
        first, *others = read(seq_idx)
        return [first + 1, others[0] - 1, *others[1:]] if others and others[0] > 1 else [first, *others]

    monkeypatch.setattr("padfree_patch.batch.lengths.lengths_of_segments", one_later)
    assert_found(batches(), check)


def test_contradictions_that_are_not_looked_for_are_found(monkeypatch):
    monkeypatch.setattr("padfree_patch.batch.lengths.check_on_device", lambda *_: None)
    monkeypatch.setattr("padfree_patch.batch.packed_batch.check_positions", lambda *_: None)
    assert_found(batches(wrongs=["disagrees"]), check)
