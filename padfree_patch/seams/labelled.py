"""The head and the loss on labelled tokens only, as `apply(model, logits="labelled")` asks, or "chunked".

Every head compares row i of its logits with label i + 1, or with label i if its loss shifts nothing. So upstream's own
head is given, instead of all T hidden states, the N that predict a label and a row of zeros, and labels that fit:

    hidden states   row of label 1   ...   row of label N   zeros
    labels          -100             label 1   ...          label N      (shifted: label 1 ... label N, -100)

Scales, caps, biases, tied weights, adapters, router losses, num_items_in_batch are upstream's code, which runs as it
is. The row of zeros meets the label -100, or is dropped by the shift.

The rows travel from the head to the decoder in `under_way.handed`, which is set while the head's forward runs. What
gradient checkpointing recomputes lies inside the decoder and needs them no more.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..batch.host import check_on_device
from ..batch.labelled_rows import LabelledRows
from ..batch.labels import IGNORED_LABEL
from ..batch.shapes import is_unreadable
from ..errors import PadfreeError
from ..upstream import Arguments
from ..wrapping.call import Call, signature
from ..wrapping.frames import outside_graphs, runs_uncompiled
from ..wrapping.opt_in import OptIn
from ..wrapping.seam import Answer
from .chunks import in_chunks
from .hand_over import LabelledTokens, on_selected
from .language_head import is_language_head, reads_first_label
from .model_call import tokens_of
from .tracing import is_transforming
from .under_way import under_way

LOGITS = ("all", "labelled", "chunked")
"""Values of `apply(logits=)`."""

CHUNK = 1024
"""Rows of logits that "chunked" has in memory at once."""

_KEPT = ("logits_to_keep", "num_logits_to_keep")
"""Arguments by which a caller asks for the logits of some tokens; by the second name until 4.49."""

_OTHERS = "fused_lm_head"
"""The argument that asks for TRL's own head, which computes labelled tokens only and gives a value for each token."""


def check_logits(logits: object) -> None:
    """Raises PadfreeError unless it is a value that `apply(logits=)` takes."""
    if logits not in LOGITS:
        raise PadfreeError(f"logits must be one of {', '.join(map(repr, LOGITS))}; found {logits!r}")


@contextmanager
def computing(logits: str, chunk: int = CHUNK) -> Iterator[None]:
    """Lets heads compute these logits in this thread, in eval mode too; for `verify`, which compares the forms."""
    outer, under_way.logits = under_way.logits, (logits, chunk)
    try:
        yield
    finally:
        under_way.logits = outer


def logits_of(model: nn.Module) -> str:
    """Says which logits a model computes in training; "all" if it is not patched."""
    return next((opt_in.logits for opt_in in OptIn.all_in(model).values()), "all")


@runs_uncompiled
def on_labelled_tokens(call: Call, run: Answer) -> object:
    """Calls upstream's head: on all tokens, or on those that predict a label if the model was patched so.

    Args:
        call: of a head, with labels that cross no boundary.
        run: calls upstream.
    """
    sent = call.arguments.pop("labelled_rows", None)
    logits, chunk = outside_graphs(logits_asked_for, call.module)
    tokens = None if logits == "all" else _labelled_tokens(call, sent)
    if tokens is None:
        return run(call)
    if under_way.logits is None:
        _check_no_metrics_of_trl(logits)
    if logits == "chunked":
        return in_chunks(call, tokens, chunk, run)
    return on_selected(call, tokens, run)


def logits_asked_for(head: nn.Module) -> tuple[str, int]:
    """Returns which logits a head's call is to compute, and in chunks of how many rows."""
    if under_way.logits is not None:
        return under_way.logits
    opt_in = OptIn.of(head)
    trains = head.training and torch.is_grad_enabled()
    return (opt_in.logits if opt_in is not None and trains else "all"), CHUNK


@torch.compiler.disable
def _labelled_tokens(call: Call, sent: LabelledRows | None) -> LabelledTokens | None:
    """Returns the tokens that predict a label; None if all logits are needed, or upstream is to say what is wrong."""
    head, arguments = call.module, call.arguments
    labels, tokens = arguments.get("labels"), tokens_of(arguments)
    if not isinstance(labels, Tensor) or tokens is None or tuple(labels.shape) != tuple(tokens.shape[:2]):
        return None
    if not is_language_head(head) or not _loss_is_upstreams(head, arguments) or _needs_all(head, arguments, labels):
        return None
    if reads_first_label(head):
        return LabelledTokens.found(labels, shifts=False)
    shifted = arguments.get("shift_labels")
    if isinstance(shifted, Tensor) and _reads_shifted(head):
        found = LabelledTokens.found(shifted, shifts=True)
    else:
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
        found = LabelledTokens.found(following, shifts=True) if sent is None else _sent(following, sent)
    return dataclasses.replace(found, also_shifted=isinstance(shifted, Tensor))


@torch.compiler.disable
def _check_no_metrics_of_trl(logits: str) -> None:
    """Raises PadfreeError if TRL's SFTTrainer calls and reads the logits of all tokens for its log, as until 1.6."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        code, module = frame.f_code, str(frame.f_globals.get("__name__"))
        if code.co_name == "compute_loss" and module.startswith("trl.") and "logits" in code.co_names:
            options = getattr(frame.f_locals.get("self"), "args", None)
            if not getattr(options, "use_liger_kernel", False):  # with which it reads none
                raise PadfreeError(
                    f"{module}.compute_loss reads the logits of all tokens for the entropy and accuracy it logs, and "
                    f"logits={logits!r} computes those of labelled ones; call padfree_patch.apply without logits=, "
                    "or take a newer TRL, whose own head computes labelled tokens only"
                )
        frame = frame.f_back


def _needs_all(head: nn.Module, arguments: Arguments, labels: Tensor) -> bool:
    """Whether a caller asks for other logits, or the call is one in which rows can't be chosen by values."""
    asks = any(isinstance(kept := arguments.get(name), Tensor) or kept for name in _KEPT)
    of_several = getattr(head, "_is_replica", False)  # of DataParallel, which joins the replicas' logits
    return bool(
        asks
        or arguments.get(_OTHERS)
        or of_several
        or is_transforming()
        or is_unreadable(labels)
        or labels.dtype not in (torch.int64, torch.int32)
    )


def _loss_is_upstreams(head: nn.Module, arguments: Arguments) -> bool:
    """Whether a head's loss is the cross entropy of upstream: inline, or its function, which others may replace."""
    if arguments.get("ignore_index", IGNORED_LABEL) != IGNORED_LABEL:
        return False
    loss = getattr(head, "loss_function", None)  # 4.46 on
    name = f"{getattr(loss, '__module__', '')}.{getattr(loss, '__name__', '')}"
    return loss is None or name == "transformers.loss.loss_utils.ForCausalLMLoss"


def _reads_shifted(head: nn.Module) -> bool:
    """Whether a head's loss knows shift_labels, which win over labels then; 4.53 on."""
    loss = getattr(head, "loss_function", None)
    return loss is not None and "shift_labels" in signature(loss).parameters


def _sent(following: Tensor, sent: LabelledRows) -> LabelledTokens:
    """Returns the tokens that the collator found. Without a device sync.

    Args:
        following: (B, T), the label of the token after each.
        sent: what the collator found.

    Raises PadfreeError, or the device's error, if labels are not among them.
    """
    message = (
        "the batch's labelled_rows are not those of its labels, which were changed after the collator made them; "
        "leave labelled_rows out of the batch"
    )
    if not isinstance(sent, LabelledRows):
        raise PadfreeError(f"labelled_rows must be what a collator of ours makes, found {type(sent).__name__}")
    if sent.total != following.numel():
        raise PadfreeError(f"{message} (of {sent.total} tokens, the labels have {following.numel()})")
    rows = sent.rows.to(following.device, non_blocking=True)
    targets = following.reshape(-1).index_select(0, rows)
    check_on_device((targets != IGNORED_LABEL).sum() == (following != IGNORED_LABEL).sum(), message)
    return LabelledTokens(rows, targets, following, shifts=True)
