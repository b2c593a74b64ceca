"""The checks that every patched model must pass.

Each check takes a function that makes the model, and raises AssertionError. `patched=False` runs it on the unpatched
model, which must fail those in `FAIL_UNPATCHED`: that shows that they would notice a patch that does nothing.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import versions
from ..batch.sequences import PackedSequences
from ..models import implementation_of
from ..patching import applied, way_of
from ..seams.rotary import depends_on_length, unscaled_length
from ..verification import rounding_of_neighbours
from .counters import LargestTensor, SyncCounter
from .models import checkpointing, examples, pack, pad
from .oracle import (
    Make,
    add_gradients,
    alone_loss_and_gradients,
    as_batch,
    assert_gradients_close,
    assert_logits_close,
    largest,
    logits_alone,
)
from .ordinary import assert_identical, ordinary_results

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTHS = (5, 9, 1, 12)
"""Tokens per example; one token is the edge case, and the others are longer than the windows under test."""


def check_logits(make: Make, *, patched: bool = True) -> None:
    """Checks that a packed row's logits are those of each example alone."""
    sequences = examples(LENGTHS)
    alone = logits_alone(make, sequences)
    with _maybe_applied(make(), patched) as model, torch.no_grad():
        assert_logits_close(model(**pack(sequences)).logits, alone)


def check_gradients(
    make: Make, *, patched: bool = True, prepare: Callable[[PreTrainedModel], object] | None = None
) -> None:
    """Checks that loss and gradients of a packed row are those of the examples alone, averaged over tokens.

    prepare: called on the model, in train mode, before it runs; `checkpointing(reentrant=True)`, for example.
    """
    sequences = examples(LENGTHS)
    loss, gradients = alone_loss_and_gradients(make, sequences)
    with _maybe_applied(make().train(), patched) as model:
        if prepare is not None:
            prepare(model)
        batch = pack(sequences)
        output = model(**batch, labels=batch["input_ids"])
        output.loss.backward()
        torch.testing.assert_close(output.loss.item(), loss, rtol=2e-6, atol=0)  # float32 means, summed in two ways
        assert_gradients_close(model, gradients)


def check_isolation(make: Make, *, patched: bool = True) -> None:
    """Checks that B's logits are bit-identical when A changes, and that the gradient of B's loss at A is exactly 0."""
    a, b = examples((9, 8))
    (other_a,) = examples((9,), seed=2)
    with _maybe_applied(make(), patched) as model:
        with torch.no_grad():
            before, after = (model(**pack([each, b])).logits[:, 9:] for each in (a, other_a))
        moved = largest(before - after)
        allowed = rounding_of_neighbours(model, before)
        assert moved <= allowed, f"B's logits moved by {moved:.2e} when A changed, allowed are {allowed:.2e}"
        gradient = _gradient_at_embeddings(model, pack([a, b]), begin=9)
        leaked = largest(gradient[:, :9])
        assert leaked == 0, f"gradient of B's loss at A's embeddings: {leaked:.2e}"
        assert largest(gradient[:, 9:]) > 0


def _gradient_at_embeddings(model: PreTrainedModel, batch: Mapping[str, Tensor], *, begin: int) -> Tensor:
    """Returns the gradient, at the embeddings, of a loss over the logits from token `begin` on."""
    embeds: Tensor = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, position_ids=batch["position_ids"]).logits
    logits[:, begin:].square().sum().backward()
    assert embeds.grad is not None
    return embeds.grad


def check_rows(make: Make, *, patched: bool = True) -> None:
    """Checks several packed rows in a batch: each row begins a sequence, whatever the row before ended with."""
    rows = [examples((3, 7, 2)), examples((6, 6), seed=3)]
    alone = torch.cat([logits_alone(make, row) for row in rows])
    batches = [pack(row) for row in rows]
    batch = {name: torch.cat([each[name] for each in batches]) for name in batches[0]}
    with _maybe_applied(make(), patched) as model, torch.no_grad():
        assert_logits_close(model(**batch).logits, alone)


def check_two_forwards(make: Make, *, patched: bool = True) -> None:
    """Checks one backward after two forwards with other boundaries, with both kinds of checkpointing and with none.

    The two rows have the same number of tokens.
    """
    rows = [examples((5, 9, 4)), examples((10, 8), seed=4)]
    expected: dict[str, Tensor] = {}
    for row in rows:
        add_gradients(expected, alone_loss_and_gradients(make, row)[1])
    for prepare in (lambda model: None, checkpointing(reentrant=True), checkpointing(reentrant=False)):
        with _maybe_applied(make().train(), patched) as model:
            prepare(model)
            batches = [pack(row) for row in rows]
            sum(model(**batch, labels=batch["input_ids"]).loss for batch in batches).backward()
            assert_gradients_close(model, expected)


def check_ordinary_calls(make: Make, *, patched: bool = True) -> None:
    """Checks that padded batches, plain calls, a cache and generate are bit-identical before, during and after.

    Each time on a new model: some rotaries of upstream remember the longest sequence that they have seen.
    """
    before = ordinary_results(make())
    with _maybe_applied(make(), patched) as model:
        assert_identical(ordinary_results(model), before)
    with _maybe_applied(make(), patched) as restored:
        pass
    assert_identical(ordinary_results(restored), before)


def check_cost(make: Make, *, patched: bool = True) -> None:
    """Checks that boundaries cost one device sync per forward, none with lengths, and no tensor of tokens x tokens.

    Syncs that upstream has in an ordinary call, unpatched, are not counted; where its code runs on each sequence, nor
    are those that it has on each example alone.
    """
    sequences = examples(LENGTHS)
    batch = pack(sequences)
    with_lengths = {**batch, "packed_sequences": PackedSequences.from_lengths(LENGTHS)} if patched else batch
    with torch.no_grad(), _maybe_applied(make(), patched) as model:
        in_a_row = syncs_of(make(), {"input_ids": batch["input_ids"]})
        if "per sequence" in way_of(model):
            in_a_row = max(in_a_row, sum(syncs_of(make(), as_batch(each)) for each in sequences))
        upstreams, ours = allowed_syncs(model, in_a_row)
        model(**batch)  # what is measured once per process, such as windows, is measured
        for call, allowed in ((batch, upstreams + ours), (with_lengths, upstreams + ours - 1)):
            found = syncs_of(model, call)
            assert found <= allowed, f"{found} syncs, allowed are {allowed}, of which {upstreams} are upstream's"
        tokens = 1024
        with LargestTensor() as largest_tensor:
            model(**pack(examples([tokens // 8] * 8)))
    # The widest layer of the tiny models gives 256 numbers per token.
    assert largest_tensor.elements < tokens**2 / 3, f"{largest_tensor.operator} made {largest_tensor.shape}"


def allowed_syncs(model: nn.Module, upstreams: int) -> tuple[int, int]:
    """Returns how many syncs of upstream's and of ours a batch of `LENGTHS` may have.

    Args:
        model: the patched model.
        upstreams: syncs of an ordinary call, unpatched.
    """
    if rotary := next((module for module in model.modules() if depends_on_length(module)), None):
        # Such a rotary asks the device for a length itself, here for each length beyond the unscaled one and once for
        # all others; and before that, it reads where the positions end.
        return len({max(length, unscaled_length(rotary)) for length in LENGTHS}) * upstreams, 2
    on_flash = implementation_of(model.config) == "flash_attention_2"
    if versions.transformers("<4.36") or (on_flash and versions.transformers("<4.45")):
        return upstreams, 2  # `0 in attention_mask`: of a tensor on the CPU, so no sync, but the counter can't tell
    return upstreams, 1


def syncs_of(model: nn.Module, batch: Mapping[str, object]) -> int:
    """Counts how often a call of the model would wait for the device."""
    with SyncCounter() as syncs:
        model(**batch)
    return syncs.total


def check_router_losses(make: Make, *, patched: bool = True) -> None:
    """Checks a mixture of experts: router logits as of each example alone, the auxiliary loss as of the padded batch.

    Also with padding at the end of the packed row, which a mask shows.
    """
    sequences = examples(LENGTHS)
    padding = torch.zeros(1, 4, dtype=torch.int64)
    with_tail = pack([*sequences, padding])
    with_tail["attention_mask"] = torch.cat([torch.ones_like(torch.cat(sequences, dim=1)), padding], dim=1)
    with torch.no_grad(), _maybe_applied(make(), patched) as model:
        alone = [make()(**as_batch(each), output_router_logits=True).router_logits for each in sequences]
        padded = make()(**pad(sequences), output_router_logits=True, use_cache=False)
        packed = model(**pack(sequences), output_router_logits=True)
        tailed = model(**with_tail, output_router_logits=True)
    expected = [torch.cat([layer.flatten(0, -2) for layer in layers]) for layers in zip(*alone)]
    for found, wanted in zip(packed.router_logits, expected):
        assert_logits_close(found.flatten(0, -2), wanted, "router logits")
    loss, knows_padding = _balance_loss(model, expected)
    for found in [packed.aux_loss, *([padded.aux_loss, tailed.aux_loss] if knows_padding else [])]:
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)  # products of float32 means over 27 tokens


def _balance_loss(model: nn.Module, router_logits: list[Tensor]) -> tuple[Tensor, bool]:
    """Returns upstream's auxiliary loss of router logits, and whether upstream leaves padding out of it."""
    balance = sys.modules[type(model).__module__].load_balancing_loss_func
    knows_padding = "attention_mask" in inspect.signature(balance).parameters  # before 4.38 it is over the padding too
    no_mask = {"attention_mask": None} if knows_padding else {}
    loss = balance(tuple(router_logits), num_experts=model.num_experts, top_k=model.num_experts_per_tok, **no_mask)
    return loss, knows_padding


@contextlib.contextmanager
def _maybe_applied(model: nn.Module, patched: bool) -> Iterator[nn.Module]:
    with applied(model) if patched else contextlib.nullcontext(model):
        yield model


CHECKS = (
    check_logits,
    check_gradients,
    check_isolation,
    check_rows,
    check_two_forwards,
    check_cost,
    check_ordinary_calls,
)
"""All checks that every patch must pass; `check_router_losses` is for mixtures of experts."""

FAIL_UNPATCHED = (check_logits, check_gradients, check_isolation, check_rows, check_two_forwards)
"""Those of `CHECKS` that a model must fail with `patched=False`, or they would notice nothing.

`check_ordinary_calls` passes then by its nature; for `check_cost` see tests/promises/test_cost.py.
"""
