"""The head and the loss in chunks of labelled tokens: never the logits of all of them in memory.

The decoder runs once. The head's own forward then runs for each chunk, inside non-reentrant checkpointing, with a
decoder that answers with the chunk's rows. What upstream's loss adds beside the cross entropy, such as a router's loss,
is the same in every chunk, and counted once, because the weights of the chunks add up to one. A forward of somebody's
own around it may do anything with loss and labels, so it is called once, with all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..batch.labels import IGNORED_LABEL
from ..upstream import Outputs
from ..wrapping.call import Call
from ..wrapping.frames import outside_graphs, runs_uncompiled
from ..wrapping.seam import Answer, is_wrapper
from .code_of import is_code_of
from .hand_over import (
    LabelledTokens,
    Selected,
    ended_by_zeros,
    handing_over,
    on_selected,
    run_waiting,
    with_hidden_states,
)

_LABELS = ("labels", "shift_labels")


class _Kept(Selected):
    """The hidden states of the labelled tokens, which are kept; the head gets the row of zeros alone."""

    output: object = None
    """What the decoder gave, with that row in the place of its hidden states."""
    rows: Tensor
    """(N, D)."""

    def serve(self, decoder: nn.Module, run: Callable[[], object]) -> object:
        output = run()
        self.rows = self.select(decoder, output)
        self.output = with_hidden_states(output, ended_by_zeros(self.rows[:0]))
        return self.output


class _Given(Selected):
    """Some rows of what was kept: no decoder runs."""

    def __init__(self, kept: _Kept, rows: Tensor):
        super().__init__(kept.head, kept.tokens)
        self._output, self._rows = kept.output, rows

    def serve(self, decoder: nn.Module, run: Callable[[], object]) -> object:
        return with_hidden_states(self._output, ended_by_zeros(self._rows))


@runs_uncompiled
def in_chunks(call: Call, tokens: LabelledTokens, size: int, run: Answer) -> object:
    """Calls upstream's head on chunks of some labelled tokens at a time; returns its output, without logits.

    Args:
        call: of the head.
        tokens: those that predict a label.
        size: of a chunk.
        run: calls upstream.
    """
    if len(tokens.rows) <= size or not outside_graphs(_only_calls, call.module):
        return outside_graphs(_without_logits, on_selected(call, tokens, run))
    kept = outside_graphs(_Kept, call.module, tokens)
    result = run_waiting(kept, run, outside_graphs(_without_labels, call))
    # The backward runs the chunks again, where nothing is compiled, and must find what the forward has made.
    return outside_graphs(_with_sum, call, kept, size, result)


_CALLERS = ("transformers.", "torch.", "accelerate.", "peft.", "liger_kernel.", f"{__name__.partition('.')[0]}.")
"""How the modules begin whose code around a head calls it and does nothing with its loss and labels."""


def _only_calls(head: nn.Module) -> bool:
    """Whether what stands around upstream's forward of a head can be called once for each chunk."""
    return is_code_of(_CALLERS, head.forward) and is_code_of(_CALLERS, type(head).forward)


def _without_labels(call: Call) -> Call:
    return call.changed(**dict.fromkeys(name for name in _LABELS if name in call.arguments))


def _with_sum(call: Call, kept: _Kept, size: int, result: object) -> object:
    return _without_logits(result, loss=_summed(call, kept, size))


def _once_more(call: Call) -> Outputs:
    """Calls the head's forward again, and nothing that hangs on the head: the first call was for that.

    A forward on the instance may be accelerate's autocast around ours, or somebody's own.
    """
    head = call.module
    if is_wrapper(head.forward):
        return call.proceed()
    return head.forward(**{name: value for name, value in call.arguments.items() if name != call.names[0]})


def _summed(call: Call, kept: _Kept, size: int) -> Tensor:
    """Returns the loss over all chunks."""
    labelled = (kept.tokens.targets != IGNORED_LABEL).sum().float()
    items = call.arguments.get("num_items_in_batch")
    tokens = kept.tokens

    def loss_of(rows: Tensor, targets: Tensor) -> Tensor:
        share = (targets != IGNORED_LABEL).sum() / labelled
        some = share > 0  # labels may have been taken out after the collator found them
        given = call.changed(**tokens.arguments(targets))
        if items is not None:  # upstream divides the sum by it; here by its part, and the weight makes up for that
            given.arguments["num_items_in_batch"] = items * torch.where(some, share, 1.0).to(_device_of(items, share))
        with handing_over(_Given(kept, rows)):
            loss = _loss_of(_once_more(given))
        share = share.to(loss.device, loss.dtype)
        return torch.where(some.to(loss.device), loss * share, loss.new_zeros(()))

    total: Tensor | None = None
    for rows, targets in zip(kept.rows.split(size), tokens.targets.split(size)):
        loss = checkpoint(loss_of, rows, targets, use_reentrant=False)
        total = loss if total is None else total + loss
    assert total is not None
    return total


def _device_of(items: object, other: Tensor) -> torch.device:
    return items.device if isinstance(items, Tensor) else other.device


def _loss_of(result: Outputs) -> Tensor:
    loss: Tensor = result["loss"] if isinstance(result, dict) else result[0]
    return loss


def _without_logits(result: Any, **changed: Tensor) -> object:
    """Returns a head's output without logits, which are of some rows only; those of a tuple stay."""
    if isinstance(result, dict):
        kept = {name: value for name, value in result.items() if name != "logits"}
        return type(result)(**{**changed, **kept, **changed})
    return (*changed.values(), *result)
