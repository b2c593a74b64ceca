"""What a head on labelled tokens hands to the decoder that it calls: which rows of hidden states it wants back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..batch.labels import IGNORED_LABEL
from ..errors import PadfreeError
from ..upstream import Arguments, Function
from ..wrapping.call import Call
from ..wrapping.frames import Outside, outside_graphs, runs_uncompiled
from ..wrapping.seam import Answer
from .language_head import is_language_head
from .under_way import under_way


@dataclasses.dataclass(frozen=True)
class LabelledTokens:
    """The tokens of a batch (B, T) that predict a label, and that label."""

    rows: Tensor
    """int64 (N,): places among the B * T tokens."""
    targets: Tensor
    """(N,): the label that each predicts."""
    predicted: Tensor
    """(B, T): what each token predicts, a label or that it is ignored. Its shape is that of the batch: numbers in the
    place of the tensor would be constants of torch.compile's graph, and every length would need a new one."""
    shifts: bool
    """Whether the loss compares a row of logits with the label after it."""
    also_shifted: bool = False
    """Whether the call has shift_labels too."""

    @classmethod
    def found(cls, predicted: Tensor, *, shifts: bool) -> LabelledTokens:
        """Finds them in what each token predicts, (B, T). One device sync."""
        flat = predicted.reshape(-1)
        rows = (flat != IGNORED_LABEL).nonzero().squeeze(1)
        return cls(rows, flat.index_select(0, rows), predicted, shifts)

    def narrow(self, call: Call) -> Call:
        """Returns a head's call with the labels of these tokens."""
        return call.changed(**self.arguments())

    def arguments(self, targets: Tensor | None = None) -> Arguments:
        """Returns the labels (1, N + 1) of a head that gets these rows, or those of some targets, and one of zeros."""
        targets = self.targets if targets is None else targets
        ignored = targets.new_full((1,), IGNORED_LABEL)
        as_they_are, after = torch.cat([targets, ignored])[None], torch.cat([ignored, targets])[None]
        labels = {"labels": after if self.shifts else as_they_are}
        return labels | ({"shift_labels": as_they_are} if self.also_shifted else {})


class Handed:
    """What a head waits for. `serve` answers the call of a decoder, which `run` runs; torch.compile may trace it."""

    def __init__(self, head: nn.Module):
        self.head = head
        self.served = False
        """Whether a decoder was called: another one that the head calls is not the one. Noted here and not in
        `under_way`, because torch.compile takes over into its graph what it writes to an object like this."""

    def serve(self, decoder: nn.Module, run: Callable[[], object]) -> object:
        raise NotImplementedError


class Selected(Handed):
    """The hidden states of the labelled tokens."""

    def __init__(self, head: nn.Module, tokens: LabelledTokens):
        super().__init__(head)
        self.tokens = tokens

    def serve(self, decoder: nn.Module, run: Callable[[], object]) -> object:
        output = run()
        return with_hidden_states(output, ended_by_zeros(self.select(decoder, output)))

    def select(self, decoder: nn.Module, output: object) -> Tensor:
        """Returns the hidden states (N, D) of the labelled tokens.

        Raises PadfreeError if the decoder gives no hidden states for each token.
        """
        states, shape = hidden_states_of(output), self.tokens.predicted.shape
        if states is None or states.shape[:2] != shape or hasattr(states, "device_mesh"):
            found = type(output).__name__ if states is None else f"{type(states).__name__} {tuple(states.shape)}"
            raise PadfreeError(
                f"{type(decoder).__name__} gives {found}, and no tensor of hidden states for {tuple(shape)} tokens, "
                f"from which rows can be taken; call padfree_patch.apply(model) with logits='all'"
            )
        return states.flatten(0, 1).index_select(0, self.tokens.rows.to(states.device, non_blocking=True))


def ended_by_zeros(rows: Tensor) -> Tensor:
    """Returns (1, N + 1, D): the rows (N, D), and one of zeros."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])[None]


def hidden_states_of(output: object) -> Tensor | None:
    """Returns what a decoder gave for each token, (B, T, D); None if that is not the first of its outputs."""
    if isinstance(output, dict):
        output = next(iter(output.values()), None)
    elif isinstance(output, tuple):
        output = output[0]
    return output if isinstance(output, Tensor) and output.dim() == 3 else None


def with_hidden_states(output: object, states: Tensor) -> object:
    """Returns a decoder's output with other hidden states in the first place."""
    if isinstance(output, dict):
        return type(output)(**{**output, next(iter(output)): states})
    return (states, *output[1:]) if isinstance(output, tuple) else states


@contextmanager
def handing_over(handed: Handed) -> Iterator[None]:
    """Says, while the forward of a head runs, what it waits for.

    Raises PadfreeError if it called no decoder that could give it.
    """
    outer, under_way.handed = under_way.handed, handed
    try:
        yield
    finally:
        under_way.handed = outer
    if not handed.served:
        raise PadfreeError(
            f"{type(handed.head).__name__} called no decoder that padfree_patch answers for, so it computed all "
            "logits; call padfree_patch.apply(model) with logits='all'"
        )


@runs_uncompiled
def run_waiting(handed: Handed, run: Answer, call: Call) -> object:
    """Runs a head that waits for something from the decoder that it calls; see `handing_over`."""
    with Outside(handing_over, handed):
        return run(call)


@runs_uncompiled
def on_selected(call: Call, tokens: LabelledTokens, run: Answer) -> object:
    """Calls a head on the hidden states of some tokens, and on their labels; `run` calls upstream."""
    return run_waiting(outside_graphs(Selected, call.module, tokens), run, outside_graphs(tokens.narrow, call))


def is_awaited(module: object) -> bool:
    """Whether a head whose forward runs waits for the hidden states of a decoder."""
    handed = _unserved()
    return handed is not None and handed.head is not module


def is_waiting(head: nn.Module) -> bool:
    """Whether a head runs that was given the labels of some rows: it is called again by a forward put over ours."""
    handed = _unserved()
    return handed is not None and handed.head is head


def _unserved() -> Handed | None:
    handed = under_way.handed
    return None if handed is None or handed.served else handed


def serve(call: Call, answer: Answer, awaited: Answer | None = None) -> object:
    """Answers the call of a decoder; of one that a head waits for, with the hidden states that it wants.

    Args:
        call: of the decoder.
        answer: answers it with all hidden states.
        awaited: does so where a head waits; None for `answer`.
    """
    if is_language_head(call.module):
        return answer(call)
    call.arguments.pop("labelled_rows", None)
    handed = _unserved()
    if handed is None:
        return answer(call)
    handed.served = True
    return handed.serve(call.module, lambda: (awaited or answer)(call))


def serve_traced(original: Function, args: tuple[Any, ...], kwargs: Arguments) -> object:
    """Answers, while torch.compile traces it, the call of a decoder that a head waits for; no other one."""
    handed = _unserved()
    if handed is None or handed.head is args[0]:
        return NotImplemented
    handed.served = True
    return handed.serve(args[0], lambda: original(*args, **kwargs))
