"""What every patched model must pass. The oracle is each example run alone through the unpatched model.

Each check takes a function that makes the model, and raises AssertionError. Most have their control built in: they
fail on the unpatched model, which the test suite shows by running them with `patched=False`.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import versions
from ..batch.sequences import PackedSequences
from ..models import implementation_of
from ..patching import applied
from ..seams.rotary import depends_on_length, unscaled_length
from ..verification import rounding_of_neighbours
from .counters import LargestTensor, SyncCounter
from .models import examples, pack, pad

Make = Callable[[], Any]

LENGTHS = (5, 9, 1, 12)
"""Tokens per example; one token is the edge case, and the others are longer than the windows under test."""

LOGIT_TOLERANCE = 2e-5
"""Relative to the largest logit, float32: other matmul shapes add in another order, a few eps per layer."""

GRADIENT_TOLERANCE = 2e-4
"""Frobenius norm of the difference over that of the gradient, per parameter; sums over all tokens."""


def check_logits(make: Make, *, patched: bool = True) -> None:
    """A packed row's logits are those of each example alone."""
    sequences = examples(LENGTHS)
    alone = logits_alone(make, sequences)
    with _maybe_applied(make(), patched) as model, torch.no_grad():
        packed = model(**pack(sequences)).logits
    error = largest(packed - alone) / largest(alone)
    assert error < LOGIT_TOLERANCE, f"logits are off by {error:.2e} of the largest"


def check_gradients(make: Make, *, patched: bool = True, prepare: Callable[[Any], Any] | None = None) -> None:
    """Loss and every parameter's gradient of a packed row are those of the examples alone, averaged over tokens.

    prepare: called on the model, in train mode, before it runs; to switch on gradient checkpointing, for example.
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
    """Changing A leaves B's logits bit-identical; the gradient of B's loss at A's embeddings is exactly zero."""
    a, b = examples((9, 8))
    (other_a,) = examples((9,), seed=2)
    with _maybe_applied(make(), patched) as model:
        with torch.no_grad():
            before, after = (model(**pack([each, b])).logits[:, 9:] for each in (a, other_a))
        moved = largest(before - after)
        allowed = rounding_of_neighbours(model, before)
        assert moved <= allowed, f"B's logits moved by {moved:.2e} when A changed, allowed are {allowed:.2e}"
        batch = pack([a, b])
        embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        logits = model(inputs_embeds=embeds, position_ids=batch["position_ids"]).logits
        logits[:, 9:].square().sum().backward()
        leaked = largest(embeds.grad[:, :9])
        assert leaked == 0, f"gradient of B's loss at A's embeddings: {leaked:.2e}"
        assert largest(embeds.grad[:, 9:]) > 0


def check_rows(make: Make, *, patched: bool = True) -> None:
    """Several packed rows in a batch: each row begins a sequence, whatever the row before ended with."""
    rows = [examples((3, 7, 2)), examples((6, 6), seed=3)]
    alone = torch.cat([logits_alone(make, row) for row in rows])
    batches = [pack(row) for row in rows]
    batch = {name: torch.cat([each[name] for each in batches]) for name in batches[0]}
    with _maybe_applied(make(), patched) as model, torch.no_grad():
        packed = model(**batch).logits
    error = largest(packed - alone) / largest(alone)
    assert error < LOGIT_TOLERANCE, f"logits are off by {error:.2e} of the largest"


def check_two_forwards(make: Make, *, patched: bool = True) -> None:
    """Two forwards with other boundaries and the same total before one backward, with both kinds of checkpointing."""
    first, second = examples((5, 9, 4)), examples((10, 8), seed=4)
    expected: dict[str, Tensor] = {}
    for sequences in (first, second):
        _, gradients = alone_loss_and_gradients(make, sequences)
        for name, gradient in gradients.items():  # an expert may have one in the first only
            expected[name] = gradient + expected.get(name, 0)
    for prepare in (lambda model: None, checkpointing(reentrant=True), checkpointing(reentrant=False)):
        with _maybe_applied(make().train(), patched) as model:
            prepare(model)
            batches = [pack(sequences) for sequences in (first, second)]
            sum(model(**batch, labels=batch["input_ids"]).loss for batch in batches).backward()
            assert_gradients_close(model, expected)


def check_ordinary_calls(make: Make, *, patched: bool = True) -> None:
    """Padded batches, plain calls, a cache and generate are bit-identical before, during and after.

    On a new model each time: some rotaries of upstream remember the longest sequence that they have seen.
    """
    before = ordinary_results(make())
    with _maybe_applied(make(), patched) as model:
        _assert_identical(ordinary_results(model), before)
    with _maybe_applied(make(), patched) as restored:
        pass
    _assert_identical(ordinary_results(restored), before)


def check_cost(make: Make, *, patched: bool = True) -> None:
    """Boundaries cost one device sync per forward and none with lengths; nothing of tokens x tokens is ever made.

    Syncs that upstream has in an ordinary call, unpatched, are not counted.
    """
    batch = pack(examples(LENGTHS))
    with_lengths = {**batch, "packed_sequences": PackedSequences.from_lengths(LENGTHS)} if patched else batch
    with torch.no_grad(), _maybe_applied(make(), patched) as model:
        upstreams, ours = _allowed_syncs(model, syncs_of(make(), {"input_ids": batch["input_ids"]}))
        model(**batch)  # what is measured once per process, such as windows, is measured
        for call, allowed in ((batch, upstreams + ours), (with_lengths, upstreams + ours - 1)):
            found = syncs_of(model, call)
            assert found <= allowed, f"{found} syncs, allowed are {allowed}, of which {upstreams} are upstream's"
        tokens = 1024
        with LargestTensor() as largest_tensor:
            model(**pack(examples([tokens // 8] * 8)))
    # The widest layer of the tiny models gives 256 numbers per token.
    assert largest_tensor.elements < tokens**2 / 3, f"{largest_tensor.operator} made {largest_tensor.shape}"


def _allowed_syncs(model: Any, upstreams: int) -> tuple[int, int]:
    """Of upstream's own and of ours, for a batch of `LENGTHS`."""
    if rotary := next((module for module in model.modules() if depends_on_length(module)), None):
        # Such a rotary asks the device for a length itself, here for each length beyond the unscaled one and once for
        # all others; and before that is read where the positions end.
        return len({max(length, unscaled_length(rotary)) for length in LENGTHS}) * upstreams, 2
    running = versions.transformers_version()
    on_flash = implementation_of(model.config) == "flash_attention_2"
    if versions.inside(running, "<4.36") or (on_flash and versions.inside(running, "<4.45")):
        return upstreams, 2  # `0 in attention_mask`: of a tensor on the CPU, so no sync, but the counter can't tell
    return upstreams, 1


def syncs_of(model: Any, batch: dict[str, Any]) -> int:
    """What a call of the model would wait for the device."""
    with SyncCounter() as syncs:
        model(**batch)
    return syncs.total


def check_router_losses(make: Make, *, patched: bool = True) -> None:
    """A mixture of experts: router logits are those of each example alone, the auxiliary loss the padded batch's.

    Also with padding at the end of the packed row, which a mask tells.
    """
    sequences = examples(LENGTHS)
    batch, padding = pack(sequences), torch.zeros(1, 4, dtype=torch.int64)
    with_tail = pack([*sequences, padding])
    with_tail["attention_mask"] = torch.cat([torch.ones_like(batch["input_ids"]), padding], dim=1)
    with torch.no_grad(), _maybe_applied(make(), patched) as model:
        alone = [make()(**as_batch(each), output_router_logits=True).router_logits for each in sequences]
        padded = make()(**pad(sequences), output_router_logits=True, use_cache=False)
        packed = model(**batch, output_router_logits=True)
        tailed = model(**with_tail, output_router_logits=True)
    expected = [torch.cat([layer.flatten(0, -2) for layer in layers]) for layers in zip(*alone)]
    for found, wanted in zip(packed.router_logits, expected):
        error = largest(found.flatten(0, -2) - wanted) / largest(wanted)
        assert error < LOGIT_TOLERANCE, f"router logits are off by {error:.2e} of the largest"
    balance: Any = sys.modules[type(model).__module__].load_balancing_loss_func
    knows_padding = "attention_mask" in inspect.signature(balance).parameters  # before 4.38 it is over the padding too
    no_mask = {"attention_mask": None} if knows_padding else {}
    loss = balance(tuple(expected), num_experts=model.num_experts, top_k=model.num_experts_per_tok, **no_mask)
    found_losses = [packed.aux_loss, *([padded.aux_loss, tailed.aux_loss] if knows_padding else [])]
    for found in found_losses:
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)  # products of float32 means over 27 tokens


CHECKS = (
    check_logits,
    check_gradients,
    check_isolation,
    check_rows,
    check_two_forwards,
    check_cost,
    check_ordinary_calls,
)


def checkpointing(*, reentrant: bool) -> Callable[[Any], None]:
    """A function that switches gradient checkpointing on, of the given kind, on any version."""

    def switch_on(model: Any) -> None:
        takes_kind = (
            "gradient_checkpointing_kwargs" in inspect.signature(model.gradient_checkpointing_enable).parameters
        )
        kind = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}} if takes_kind else {}  # 4.35 on
        model.gradient_checkpointing_enable(**kind)
        if reentrant:
            model.enable_input_require_grads()

    return switch_on


def as_batch(tokens: Tensor) -> dict[str, Tensor]:
    """An example as a batch of its own, as padding would make it: Falcon's ALiBi is causal on sdpa only with a mask."""
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def logits_alone(make: Make, sequences: Sequence[Tensor]) -> Tensor:
    """(1, T, V): each example through an unpatched model of its own, which no other example has left traces in."""

    def run(tokens: Tensor) -> Tensor:
        try:
            return make()(**as_batch(tokens)).logits
        except TypeError:  # Falcon 4.36 to 4.44 can't run one token alone; what follows it can't change its logits
            assert tokens.shape[1] == 1
            return make()(**as_batch(tokens.repeat(1, 2))).logits[:, :1]

    with torch.no_grad():
        return torch.cat([run(each) for each in sequences], dim=1)


def alone_loss_and_gradients(make: Make, sequences: Sequence[Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The mean loss over all predicted tokens of the examples, each run alone, and its gradients."""
    predicted = sum(each.shape[1] - 1 for each in sequences)
    loss = 0.0
    gradients: dict[str, Tensor] = {}
    for each in sequences:
        if each.shape[1] == 1:
            continue  # nothing to predict, and upstream's mean over no tokens is NaN
        model = make().train()
        weighted = model(**as_batch(each), labels=each).loss * (each.shape[1] - 1) / predicted
        weighted.backward()
        loss += weighted.item()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad + gradients.get(name, 0)
    return loss, gradients


def assert_gradients_close(model: Any, expected: dict[str, Tensor]) -> None:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in expected.items():
        difference = found.get(name, 0) - gradient  # an expert that no token came to may have none
        error = difference.norm() / gradient.norm().clamp_min(1e-12)
        assert error < GRADIENT_TOLERANCE, f"gradient of {name} is off by {error:.2e}"
    for name in found.keys() - expected.keys():
        assert found[name].norm() == 0, f"{name} has a gradient, which it has not alone"


def ordinary_results(model: Any) -> dict[str, Any]:
    """What a model gives for the calls that hold no packed row; of a call that upstream refuses, the error."""
    short, long = examples((6, 10), vocab_size=model.config.vocab_size)
    pad = torch.zeros(1, 4, dtype=torch.int64)
    right, left = torch.cat([torch.cat([short, pad], 1), long]), torch.cat([torch.cat([pad, short], 1), long])
    right_mask = torch.tensor([[1] * 6 + [0] * 4, [1] * 10])
    left_mask = right_mask.flip(1)
    left_positions = (left_mask.cumsum(-1) - 1).masked_fill(left_mask == 0, 1)
    padded_left = {"input_ids": left, "attention_mask": left_mask, "position_ids": left_positions}

    def continued() -> Tensor:
        cache = model(input_ids=long[:, :7], use_cache=True).past_key_values
        logits: Tensor = model(
            input_ids=long[:, 7:], past_key_values=cache, position_ids=torch.arange(7, 10).unsqueeze(0)
        ).logits
        return logits

    def second_turn() -> Tensor:
        """Left-padded, with a cache, a mask that covers both turns, and more than one token."""
        cache = model(**padded_left, use_cache=True).past_key_values
        both = torch.cat([left_mask, left_mask], 1)
        positions = (both.cumsum(-1) - 1).masked_fill(both == 0, 1)[:, 10:]
        turn = {"input_ids": left, "attention_mask": both, "past_key_values": cache, "position_ids": positions}
        logits: Tensor = model(**turn).logits
        return logits

    calls: dict[str, Callable[[], Tensor]] = {
        "no cache": lambda: model(input_ids=long, use_cache=False).logits,
        "positions": lambda: model(input_ids=long, position_ids=torch.arange(10).unsqueeze(0)).logits,
        "padded right": lambda: model(input_ids=right, attention_mask=right_mask, labels=right, use_cache=False).logits,
        "padded right, cached": lambda: model(input_ids=right, attention_mask=right_mask).logits,
        "padded left": lambda: model(**padded_left).logits,
        "cache": continued,
        "second turn": second_turn,
        "generate": lambda: model.generate(
            left, attention_mask=left_mask, max_new_tokens=5, do_sample=False, pad_token_id=0
        ),
    }
    with torch.no_grad():
        return {"plain": model(input_ids=long).logits, **{name: _result_or_error(call) for name, call in calls.items()}}


def _result_or_error(call: Callable[[], Tensor]) -> Tensor | str:
    try:
        return call()
    except Exception as error:  # upstream can't do everything in every version; patched it must fail in the same way
        return repr(error)


def largest(tensor: Tensor) -> float:
    return tensor.detach().abs().max().item()


def _assert_identical(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if isinstance(value, str):
            assert found[name] == value, f"{name}: unpatched {value}, patched {found[name]}"
            continue
        same = isinstance(found[name], Tensor) and torch.equal(found[name], value)
        assert same, f"{name}: not bit-identical to the unpatched model: {found[name]}"


@contextlib.contextmanager
def _maybe_applied(model: Any, patched: bool) -> Any:
    if not patched:
        yield model
        return
    with applied(model):
        yield model
