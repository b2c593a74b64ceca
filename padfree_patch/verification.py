"""verify: proves on the loaded model itself that the examples of a packed row do not mix.

Two probes that share nothing: change example A and example B's logits must not move; and the gradient of B's loss at
A's embeddings must be exactly zero, which needs no tolerance. A third compares the packed row with each example alone.
All three run through the model's own forward, without dropout, on seventeen random tokens.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from . import rope
from .errors import LeakError
from .forward import needs_rows
from .registry import pretrained_modules, registry

LENGTHS = (9, 8)
"""Tokens of examples A and B."""

_ALONE_TOLERANCE_EPS = 170
"""Packed against alone, relative to the largest logit, in units of the dtype's eps: 2e-5 in float32. The two differ by
the order of additions (other matmul shapes), a few eps per layer; a leak moves logits by 1e-2 and more."""


_ROUTER = re.compile(r"(^|\.)(experts|router)(\.|$)")
"""Names of submodules that mixtures of experts have, in every version."""


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` measured. True in a condition if examples do not mix."""

    model: str
    """Class of the model."""
    logit_change: float = float("nan")
    """Largest change of B's logits when A changes; 0 if isolated."""
    change_tolerance: float = 0.0
    """What `logit_change` may be: 0, but for mixtures of experts (`rounding_of_neighbours`)."""
    leaked_gradient: float = float("nan")
    """Largest gradient of B's loss at A's embeddings, absolute; 0 if isolated."""
    alone_error: float = float("nan")
    """Largest difference between packed and alone, relative to the largest logit."""
    alone_tolerance: float = float("nan")
    """What `alone_error` may be in the model's dtype."""
    alone_refused: str | None = None
    """Why upstream can't run an example alone (`Patch.upstream_refuses`), if so: nothing to compare with."""
    first_leak: str | None = None
    """Name of the first module whose output at B changes with A though its input at B does not."""
    skipped: str | None = None
    """Why nothing could be measured, if so."""

    @property
    def isolated(self) -> bool:
        """Whether both leak probes came out as they must."""
        return self.logit_change <= self.change_tolerance and self.leaked_gradient == 0

    @property
    def finite(self) -> bool:
        """Whether the logits were numbers."""
        return math.isfinite(self.logit_change) and (bool(self.alone_refused) or math.isfinite(self.alone_error))

    @property
    def ok(self) -> bool:
        return self.isolated and (bool(self.alone_refused) or self.alone_error <= self.alone_tolerance)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.model}: not verified: {self.skipped}"
        allowed = f"at most {self.change_tolerance:.3g}" if self.change_tolerance else "must be 0"
        if not self.finite:
            return f"{self.model}: the logits are not finite, so nothing can be said; look at the weights"
        verdict = "examples do not mix" if self.ok else "EXAMPLES MIX" if not self.isolated else "WRONG RESULT"
        lines = [
            f"{self.model}: {verdict}",
            f"  change of B's logits when A changes   {self.logit_change:.3g} ({allowed})",
            f"  gradient of B's loss at A's embeddings {self.leaked_gradient:.3g} (must be 0)",
            f"  packed against alone, relative         {self.alone_error:.3g} (at most {self.alone_tolerance:.3g})"
            if not self.alone_refused
            else f"  not compared with alone, where upstream fails: {self.alone_refused}",
        ]
        if self.first_leak:
            lines.append(f"  first module that leaks                {self.first_leak}")
        return "\n".join(lines)

    def raise_if_leaking(self) -> None:
        """Raises LeakError, with the whole report, unless `ok`."""
        if not self.ok:
            raise LeakError(f"the patched model does not isolate its examples; it was put back as it was\n{self}")


def verify(model: nn.Module) -> Verification:
    """Measures whether `model`, as it is now, isolates the examples of a packed row.

    Works in train and eval mode, with frozen parameters, inside PEFT and under `torch.no_grad`. Leaves parameters,
    gradients, modes and the random state as they were. Takes seven short forwards and one backward. Of a model with a
    head that gives one result per row, the decoder is looked at. A model with weights of several dtypes that can't run
    otherwise is run under autocast.

    Returns the figures; nothing is raised for a leak. Weights on the meta device or sharded over processes can't be
    run: then `skipped` says so.
    """
    module = _unwrapped(model)
    name = type(pretrained_modules(model)[0]).__name__ if pretrained_modules(model) else type(model).__name__
    if reason := _why_not(model):
        return Verification(model=name, skipped=reason)
    with _untouched(model), torch.inference_mode(False), torch.enable_grad():
        probe = _Probe(module)
        change = probe.logit_change()
        gradient = probe.leaked_gradient()
        refused = _alone_refused(model)
        error, tolerance = (math.nan, math.nan) if refused else probe.alone_error()
        allowed = rounding_of_neighbours(model, probe.packed(probe.a))
        leaks = change > allowed or gradient != 0
        return Verification(
            model=name,
            logit_change=change,
            change_tolerance=allowed,
            leaked_gradient=gradient,
            alone_error=error,
            alone_tolerance=tolerance,
            alone_refused=refused,
            first_leak=probe.first_leak() if leaks else None,
        )


def rounding_of_neighbours(model: nn.Module, logits: Tensor) -> float:
    """How far an example's logits may move when its neighbour changes: 0, but for mixtures of experts a few eps.

    How many tokens an expert multiplies at once depends on all tokens of the batch, and matmuls of other shapes round
    otherwise. So it is upstream's padded batch too. The gradient at the neighbour stays exactly zero all the same.
    """
    routed = any(_ROUTER.search(name) for name, _ in model.named_modules())
    return _ALONE_TOLERANCE_EPS * torch.finfo(logits.dtype).eps * _largest(logits) if routed else 0.0


def _alone_refused(model: nn.Module) -> str | None:
    config: Any = pretrained_modules(model)[0].config
    patch = registry().get(getattr(config, "model_type", None))
    return patch.upstream_refuses(config) if patch is not None and patch.upstream_refuses is not None else None


@torch.enable_grad()
def run_packed(model: nn.Module) -> None:
    """One packed forward of the probe's two examples; for hooks that look at what reaches the layers."""
    with _untouched(model):
        probe = _Probe(_unwrapped(model))
        probe.packed(probe.a)


@torch.enable_grad()
def run_alone(model: nn.Module) -> None:
    """Runs one of the probe's examples alone, unless upstream is known to refuse that (`Patch.upstream_refuses`)."""
    if _alone_refused(model):
        return
    with _untouched(model):
        probe = _Probe(_unwrapped(model))
        probe.alone(probe.b)


class _Probe:
    """Two random examples A and B, and another A of the same length, as embeddings (1, tokens, D).

    The embeddings require gradients, as they do in training. Without, bitsandbytes' 4-bit layers take their path for
    inference on some CPUs: it rounds to bfloat16 and rewrites the weights, so that they can't be trained any more.
    """

    def __init__(self, model: nn.Module):
        models: list[Any] = pretrained_modules(model)
        self.model = models[0].base_model if needs_rows(models[0]) else model
        embedding: Any = pretrained_modules(model)[0].get_input_embeddings()  # type: ignore[operator]
        device = embedding.weight.device
        generator = torch.Generator().manual_seed(0)
        vocabulary = embedding.weight.shape[0]
        ids = [torch.randint(vocabulary, (1, n), generator=generator).to(device) for n in (*LENGTHS, LENGTHS[0])]
        self.a, self.b, self.other_a = (embedding(each).detach().requires_grad_() for each in ids)
        self.positions = torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0).to(device)
        self.autocast: Any = nullcontext()
        dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        if len(dtypes) > 1:
            try:
                self.alone(self.b)
            except RuntimeError:  # norms in float32 beside weights in bfloat16: trained, and so run, under autocast
                self.autocast = torch.autocast(device.type, max(dtypes, key=lambda dtype: torch.finfo(dtype).eps))

    def logits(self, embeds: Tensor, **options: Any) -> Tensor:
        # As new, or the longest sequence so far would decide how the others are rotated.
        with rope.as_new(self.model), self.autocast:
            output = self.model(inputs_embeds=embeds, **options)
        if isinstance(output, tuple):
            first: Tensor = output[0]
            return first
        # By name: a mixture of experts that gives its router's loss gives it before the logits.
        named: Tensor = output["logits"] if "logits" in output else next(iter(output.values()))
        return named

    def alone(self, embeds: Tensor) -> Tensor:
        """As in a padded batch, so with a mask: Falcon's ALiBi on sdpa is not causal without one (4.36 to 4.39)."""
        return self.logits(embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device))

    def packed(self, a: Tensor) -> Tensor:
        return self.logits(torch.cat([a, self.b], dim=1), position_ids=self.positions)

    def logit_change(self) -> float:
        before, after = self.packed(self.a), self.packed(self.other_a)
        return _largest((before - after)[:, LENGTHS[0] :])

    def leaked_gradient(self) -> float:
        a = self.a.detach().clone().requires_grad_()
        loss = self.packed(a)[:, LENGTHS[0] :].float().square().sum()
        (gradient,) = torch.autograd.grad(loss, a, allow_unused=True)
        return 0.0 if gradient is None else _largest(gradient)

    def alone_error(self) -> tuple[float, float]:
        """Relative difference between packed and alone, and what it may be."""
        # Old versions cast the logits up, and a prepared model may enter autocast itself: the coarsest dtype that any
        # linear layer gives sets the bound.
        dtypes: set[torch.dtype] = set()
        linears = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        hooks = [each.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype)) for each in linears]
        try:
            alone = torch.cat([self.alone(each) for each in (self.a, self.b)], dim=1)
        finally:
            for hook in hooks:
                hook.remove()
        packed = self.packed(self.a)
        error = _largest(packed.float() - alone.float()) / max(_largest(alone), torch.finfo(torch.float32).tiny)
        coarsest = max(torch.finfo(dtype).eps for dtype in dtypes | {alone.dtype})
        return error, min(_ALONE_TOLERANCE_EPS * coarsest, 0.1)

    def first_leak(self) -> str | None:
        """The innermost module whose output at B differs between two As though what comes in at B is the same."""
        runs = []
        for a in (self.a, self.other_a):
            seen: list[tuple[str, list[Tensor], list[Tensor]]] = []
            hooks = [
                module.register_forward_hook(_recorder(name, seen), with_kwargs=True)
                for name, module in self.model.named_modules()
                if name
            ]
            try:
                self.packed(a)
            finally:
                for hook in hooks:
                    hook.remove()
            runs.append(seen)
        for (name, inputs, outputs), (_, other_inputs, other_outputs) in zip(*runs):
            if _same(inputs, other_inputs) and not _same(outputs, other_outputs):
                return name
        return None


def _recorder(name: str, seen: list[Any]) -> Any:
    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((name, _at_b((args, kwargs)), _at_b(output)))

    return record


def _at_b(value: Any) -> list[Tensor]:
    """The part at B of every floating-point tensor (1, A + B tokens, ...) in nested containers."""
    if isinstance(value, Tensor):
        fits = value.is_floating_point() and value.dim() == 3 and value.shape[1] == sum(LENGTHS)
        return [value[:, LENGTHS[0] :].detach().clone()] if fits else []
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _at_b(item)]
    return []


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others))


def _largest(values: Tensor) -> float:
    """Largest magnitude; NaN stays NaN, which is never 0."""
    return values.detach().float().abs().max().item()


def _unwrapped(model: nn.Module) -> nn.Module:
    """Without what would synchronise with other processes, or compile the probe: DDP, torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _why_not(model: nn.Module) -> str | None:
    if not pretrained_modules(model):
        return "no transformers model inside"
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            return f"parameter {name} is on the meta device"
        if hasattr(parameter, "device_mesh") or (parameter.numel() == 0 and hasattr(parameter, "ds_shape")):
            return f"parameter {name} is sharded over processes"
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        return "the model is sharded over processes (FSDP)"
    return None


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """No dropout, no autocast; modes, random state and caches (rotary tables grow) are put back afterwards."""
    training = [(module, module.training) for module in model.modules()]
    attributes = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules() if module._buffers]
    values = [(buffer, buffer.clone()) for _, _, own in attributes for buffer in own.values() if buffer is not None]
    types = {p.device.type for p in model.parameters()}
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=cuda))
            for device_type in types:
                stack.enter_context(torch.autocast(device_type, enabled=False))
            for module, _ in training:
                module.training = False
            yield
    finally:
        for module, own, buffers in attributes:
            vars(module).clear()
            vars(module).update(own)
            module._buffers.clear()
            module._buffers.update(buffers)
        for module, mode in training:
            module.training = mode
        for buffer, value in values:
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)
