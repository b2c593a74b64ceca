"""verify: proves on the loaded model itself that the examples of a packed row do not mix.

Two probes that share nothing: example A changes, and example B's logits must not move; and the gradient of B's loss at
A's embeddings must be exactly zero, which needs no tolerance. A third compares the packed row with each example alone.
All three run through the model's own forward, without dropout, on seventeen random tokens. On a batch of the caller's
the third runs alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..models import check_is_module, pretrained_modules
from ..registry import registry
from ..seams.labelled import logits_of
from .dtypes import autocast_around
from .labelled import Comparison, compare_logits
from .probe import LENGTHS, TOLERANCE_EPS, Probe, largest
from .real_batch import error_on_batch
from .result import Verification
from .sight import Sight, look
from .untouched import untouched, unwrapped, why_it_cannot_run

__all__ = [
    "LENGTHS",
    "Sight",
    "Verification",
    "compare_with_all_logits",
    "look",
    "reads_first_label",
    "rounding_of_neighbours",
    "run_alone",
    "run_packed",
    "sees_later_tokens",
    "verify",
    "verify_as_it_trains",
    "verify_in_training",
    "why_it_cannot_run",
    "why_nothing_shows",
]

_ROUTER = re.compile(r"(^|\.)(experts|router)(\.|$)")
"""Names of submodules that mixtures of experts have, in every version."""


def verify(model: nn.Module, batch: Mapping[str, object] | None = None) -> Verification:
    """Measures whether `model`, as it is now, isolates the examples of a packed row.

    With `batch`, a packed batch of yours on the model's device (input_ids (B, T) and what says where examples end),
    each of its examples is run alone and compared, without gradients: about two forwards, on the lengths that you train
    on. Without it, the examples are random and short.

    Works in train and eval mode, with frozen parameters, inside PEFT and under `torch.no_grad`. Leaves parameters,
    gradients, modes and the random state as they were. Takes five short forwards and one backward; in half precision
    two more forwards, which measure how far rounding alone moves the model. If the head gives one result per row, only
    the decoder is run. If weights of several dtypes can't run without autocast, they are run under it.

    Returns the figures; nothing is raised for a leak. Weights on the meta device or sharded over processes can't be
    run, and where no output depends on the tokens, as with weights of zero, nothing shows: then `skipped` says so.

    Raises PadfreeError if `model` is no module, or `batch` not packed.
    """
    return _verified(model, None, batch)


def verify_as_it_trains(model: nn.Module) -> Verification:
    """Does what `verify` does under the autocast that is on where it is called, with the backends that it leads to."""
    return _verified(model, autocast_around(model))


def verify_in_training(model: nn.Module, modules: Iterable[nn.Module]) -> Verification:
    """Does what `verify` does with some modules in training mode, where they may call other kernels."""
    return _verified(model, None, training=modules)


def _verified(
    model: nn.Module,
    autocast: AbstractContextManager[object] | None,
    batch: Mapping[str, object] | None = None,
    training: Iterable[nn.Module] = (),
) -> Verification:
    check_is_module(model)
    models = pretrained_modules(model)
    name = type(models[0] if models else model).__name__
    if reason := why_it_cannot_run(model):
        return Verification(model=name, skipped=reason)
    with untouched(model, training), torch.inference_mode(False), torch.enable_grad():
        if batch is not None:
            error, tolerance, examples = error_on_batch(model, batch, Probe(unwrapped(model), autocast))
            result = Verification(model=name, alone_error=error, alone_tolerance=tolerance, examples=examples)
            return result.of(model)
        return _measure(name, model, Probe(unwrapped(model), autocast)).of(model)


def _measure(name: str, model: nn.Module, probe: Probe) -> Verification:
    own_change, change = probe.logit_changes()
    if own_change == 0 and (reason := why_nothing_shows(model)):
        return Verification(model=name, skipped=reason)
    gradient = probe.leaked_gradient()
    refused = _why_alone_is_refused(model)
    error, tolerance = (math.nan, math.nan) if refused else probe.alone_error()
    allowed = rounding_of_neighbours(model, probe.row)
    leaks = change > allowed or gradient != 0
    labelled = Comparison() if (logits := logits_of(model)) == "all" else compare_logits(probe, logits)
    return Verification(
        model=name,
        logit_change=change,
        change_tolerance=allowed,
        leaked_gradient=gradient,
        alone_error=error,
        alone_tolerance=tolerance,
        alone_refused=refused,
        labelled_error=labelled.error,
        labelled_tolerance=labelled.tolerance,
        labelled_failed=labelled.failed,
        first_leak=probe.first_leak() if leaks else None,
        first_difference=probe.first_difference() if not leaks and error > tolerance else None,
    )


def compare_with_all_logits(model: nn.Module) -> Comparison:
    """Measures how far loss and gradients are from those with all logits, of a model that computes some only.

    On the probe's packed row, with everything put back as `verify` does.
    """
    with untouched(model), torch.inference_mode(False), torch.enable_grad():
        return compare_logits(Probe(unwrapped(model)), logits_of(model))


def rounding_of_neighbours(model: nn.Module, logits: Tensor) -> float:
    """Gives how far an example's logits may move when its neighbour changes: 0, or a few eps if experts are routed.

    How many tokens an expert multiplies at once depends on all tokens of the batch, and matmuls of different shapes
    round differently. Upstream's padded batches show the same effect. The gradient at the neighbour is still exactly 0.
    """
    routed = any(_ROUTER.search(name) for name, _ in model.named_modules())
    return TOLERANCE_EPS * torch.finfo(logits.dtype).eps * largest(logits) if routed else 0.0


def _why_alone_is_refused(model: nn.Module) -> str | None:
    config = pretrained_modules(model)[0].config
    patch = registry().get(getattr(config, "model_type", None))
    return patch.upstream_refuses(config) if patch is not None and patch.upstream_refuses is not None else None


@torch.enable_grad()
def why_nothing_shows(model: nn.Module) -> str | None:
    """Says why the outputs of a model, as it runs one example alone, can't tell a leak from none; None if they can.

    So it is before its weights are there: on ranks that wait for those of another, they are whatever the memory held.
    """
    if _why_alone_is_refused(model):
        return None
    with untouched(model):
        probe = Probe(unwrapped(model))
        some, other = (probe.alone(each) for each in (probe.a, probe.other_a))
    names = (name for name, each in model.named_parameters() if not torch.isfinite(each.detach().float().sum()))
    if not torch.isfinite(some).all():
        where = next((f" ({name} is not finite)" for name in names), "")
        return f"its outputs are not finite for one example alone either{where}{_AS_IF}"
    return None if largest(some - other) else f"its outputs do not depend on the tokens{_AS_IF}"


_AS_IF = ", as if its weights were not loaded yet"


@torch.enable_grad()
def sees_later_tokens(model: nn.Module) -> float | None:
    """Measures how far an example's outputs change when a later token does, on the model as it is; None if not at all.

    None too for a model that can't be run.
    """
    if why_it_cannot_run(model):
        return None
    with untouched(model):
        probe = Probe(unwrapped(model))
        change, some = probe.change_by_later_token(), probe.alone(probe.b)
        allowed = TOLERANCE_EPS * torch.finfo(some.dtype).eps * largest(some)
    return change if change > allowed else None


def reads_first_label(model: nn.Module) -> bool:
    """Whether a model's loss reads the label of the first token, which others leave out: nothing comes before it."""
    if why_it_cannot_run(model):
        return False
    with untouched(model), torch.no_grad():
        loss = Probe(unwrapped(model)).loss_of_first_label()
    return loss is not None and math.isfinite(loss) and loss != 0


@torch.enable_grad()
def run_packed(model: nn.Module) -> None:
    """Makes one packed forward of the probe's two examples; for hooks that look at what reaches the layers."""
    with untouched(model):
        probe = Probe(unwrapped(model))
        probe.packed(probe.a)


@torch.enable_grad()
def run_alone(model: nn.Module) -> None:
    """Runs one of the probe's examples alone, unless upstream is known to refuse that (`Patch.upstream_refuses`)."""
    if _why_alone_is_refused(model):
        return
    with untouched(model):
        probe = Probe(unwrapped(model))
        probe.alone(probe.b)
