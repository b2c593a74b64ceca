"""explain: what upstream does with a packed row on this very model, why, and what apply would do about it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import nn

from .. import attention, verification, versions
from ..errors import PadfreeError
from ..html_table import html_table
from ..models import implementation_of, pretrained_modules
from ..registry import Patch, found_by_check, patch_for
from ..seams.kernel import recording_windows
from ..seams.labelled import logits_of
from ..seams.rotary import depends_on_length
from ..upstream import Arguments
from ..verification import Verification
from . import applied, is_applied, places, support, way_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Measured on the model, not looked up; `str()` reads well, `as_dict()` is for machines."""

    model: str
    """Class of the model."""
    model_type: str | None
    transformers: str
    """Version that runs."""
    implementation: str | None
    """Attention implementation that the model was loaded with."""
    patched: bool
    """Whether the model is patched now."""
    logits: str = "all"
    """Which logits a training forward with labels computes (`apply(logits=)`)."""
    refused: str | None = None
    """Why apply would refuse the model, if so."""
    way: str = ""
    """How apply keeps examples apart, found in the model and verified; empty if its patch says all."""
    tested: str | None = None
    """transformers versions that the patch was tested on."""
    table: str = "untested"
    """What the support table says of this version and implementation: exact, refused, ..., or untested."""
    now: Verification | None = None
    """What verify measures on the model as it is."""
    without_cache: Verification | None = None
    """The same with `use_cache=False`, unless it is patched or has no cache."""
    after: Verification | None = None
    """What it measures on the patched model."""
    backend: str | None = None
    """Backend that "auto" takes for the model's device and dtype as they are now."""
    backends: dict[str, str] = dataclasses.field(default_factory=dict)
    """Every backend, with "works" or what speaks against it here."""
    windows: tuple[int, ...] = ()
    """Tokens that a query sees in each layer, itself included; 0 for all."""
    notes: tuple[str, ...] = ()
    """What upstream does in this version that one would not expect."""
    places: tuple[str, ...] = ()
    """The functions that apply wraps."""

    verbose: bool = False
    """Whether `str()` shows all, or five lines."""

    def as_dict(self) -> dict[str, object]:
        """Gives all that was found, ready for JSON."""
        found = dataclasses.asdict(self)
        del found["verbose"]
        return found

    def __str__(self) -> str:
        lines = [self._heading(), *(f"  {name}: {said}" for name, said in self._summary())]
        if self.verbose:
            lines += [f"  {name}: {said}" for name, said in self._details()]
        elif not self.refused:
            lines[-1] += f"; verbose: {self._what_else()}"
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Shows all that was found as a table in a notebook."""
        rows = [*self._summary(), *(self._details() if self.verbose else ())]
        return html_table(self._heading(), rows, good=not self.refused and bool(self.after))

    def _heading(self) -> str:
        return f"{self.model} ({self.implementation}) on transformers {self.transformers}"

    def _summary(self) -> list[tuple[str, str]]:
        """Returns what is worth five lines: name and finding."""
        rows = []
        if self.now is not None:
            rows.append(("patched" if self.patched else "upstream alone, model(**batch)", _verdict(self.now)))
        if self.without_cache is not None:
            rows.append(("upstream alone, use_cache=False", _verdict(self.without_cache)))
        if self.refused:
            return [*rows, ("apply refuses it", self.refused)]
        if not self.patched and self.after is not None:
            rows.append(("after apply", _verdict(self.after)))
        if self.way:
            how = f"found in the model and verified: {self.way}"
        else:
            how = f"patch {self.model_type}, tested on transformers {self.tested}, in this version: {self.table}"
        if self.logits != "all":
            rows.append(("training forwards with labels", _LOGITS[self.logits]))
        return [*rows, ("how", f"{how}; backend {self.backend}" if self.backend else how)]

    def _details(self) -> list[tuple[str, str]]:
        """Returns the rest."""
        rows = [("note", note) for note in self.notes]
        rows += [(f"backend {name}", word) for name, word in self.backends.items()]
        if any(self.windows):
            rows.append(("tokens that a query sees, per layer", ", ".join(str(w or "all") for w in self.windows)))
        return [*rows, *(("apply wraps", place) for place in self.places)]

    def _what_else(self) -> str:
        notes = f"{len(self.notes)} note{'s' * (len(self.notes) != 1)}, " if self.notes else ""
        return f"{notes}the other backends, and what is wrapped"


_LOGITS = {
    "labelled": "logits of the N tokens that predict a label, and a row of zeros, (1, N + 1, vocabulary)",
    "chunked": "no logits; loss and gradients are computed in chunks of the tokens that predict a label",
}


def explain(model: nn.Module, *, verbose: bool = False) -> Explanation:
    """Measures the model as it is and, unless it is patched already, as it would be after apply. Changes nothing.

    As it is, it is measured in two ways of calling, in which newer versions of transformers differ: `model(**batch)`,
    and without a cache, as the Trainer calls it from 5.0 on, TRL, and every trainer with gradient checkpointing.

    Args:
        model: a transformers model, patched or not.
        verbose: whether the text of the result shows all that was found, or five lines.

    Raises nothing for an unsupported model: then `refused` says why.
    """
    models = pretrained_modules(model) if isinstance(model, nn.Module) else []
    if not models:
        raise PadfreeError(f"{type(model).__name__} is not a transformers model and holds none")
    config = models[0].config
    facts: Arguments = {
        "model": type(models[0]).__name__,
        "model_type": getattr(config, "model_type", None),
        "transformers": str(versions.transformers_version()),
        "implementation": implementation_of(config),
        "patched": is_applied(model),
        "logits": logits_of(model),
        "verbose": verbose,
    }
    try:
        patch = patch_for(model)
        facts["now"] = _now(model)
        facts["without_cache"] = None if is_applied(model) else _now_without_cache(model)
        with applied(model, verify=found_by_check(patch)):
            facts["after"] = verification.verify(model)
            windows = _windows(model, patch, config) if not facts["after"].skipped else ()
            facts["places"], facts["way"] = places(model), way_of(model)
    except PadfreeError as error:
        return Explanation(**facts, refused=str(error))
    needs = _needs(model, config, windows)
    return Explanation(
        **facts,
        tested=patch.transformers if patch is not None else None,
        table=support.status(facts["transformers"], facts["model_type"], facts["implementation"]),
        backend=attention.select(needs).NAME if needs else None,
        backends={each.NAME: each.refusal(needs) or "works" for each in attention.BACKENDS} if needs else {},
        windows=windows,
        notes=tuple(_notes(model, config, windows, patch)),
    )


def _now(model: nn.Module) -> Verification:
    """Measures a model as it is; upstream's own error for a packed row is a result too."""
    try:
        return verification.verify(model)
    except PadfreeError:
        raise
    except Exception as error:
        return Verification(model=type(model).__name__, skipped=f"a packed row fails: {error!r}")


def _now_without_cache(model: nn.Module) -> Verification | None:
    """Measures a model as trainers call it that switch the cache off in its config; None if it has none."""
    configs = [each.config for each in pretrained_modules(model) if hasattr(each.config, "use_cache")]
    before = [config.use_cache for config in configs]
    try:
        for config in configs:
            config.use_cache = False
        return _now(model) if configs else None
    finally:
        for config, use_cache in zip(configs, before):
            config.use_cache = use_cache


def _verdict(result: Verification) -> str:
    if result.skipped:
        return f"not measured, {result.skipped}"
    if result.ok:
        return "examples do not mix, and each gives what it gives alone"
    if not result.finite:
        return "the logits are not finite, so nothing can be said; look at the weights"
    where = f", first in {result.first_leak}" if result.first_leak else ""
    return (
        f"EXAMPLES MIX: changing one moves the other's logits by {result.logit_change:.2g}{where}"
        if not result.isolated
        else f"WRONG: packed logits are off by {result.alone_error:.2g}"
    )


_SMALL_WINDOW = 4


def _windows(model: nn.Module, patch: Patch | None, config: PretrainedConfig) -> tuple[int, ...]:
    """Returns the window that each layer's kernel is called with, in a packed forward of the patched model."""
    configured = getattr(config, "sliding_window", None)
    attentions = [module for module in model.modules() if patch is not None and patch.is_attention(module)]
    # On flash-attn, versions before 4.43 apply a window to rows longer than it only, so to one that the probe exceeds.
    by_row = configured and any(hasattr(module, "_flash_attention_forward") for module in attentions)
    try:
        if by_row:
            config.sliding_window = _SMALL_WINDOW
        with recording_windows() as seen:
            verification.run_packed(model)
    finally:
        if by_row:
            config.sliding_window = configured
    return tuple(window + configured - _SMALL_WINDOW if configured and by_row and window else window for window in seen)


def _needs(model: nn.Module, config: PretrainedConfig, windows: tuple[int, ...]) -> attention.Needs | None:
    """Returns what an attention backend must be able to do for a model; None for one without attention heads."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(text, "num_attention_heads", None)
    head_dim = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else None)
    if head_dim is None:
        return None
    weight: torch.Tensor = next(each for each in model.parameters() if each.is_floating_point())
    return attention.Needs(weight.device.type, weight.dtype, head_dim, window=max(windows, default=0))


def _notes(model: nn.Module, config: PretrainedConfig, windows: tuple[int, ...], patch: Patch | None) -> list[str]:
    notes = []
    configured = getattr(config, "sliding_window", None)
    odd = sorted({window for window in windows if window and window != configured})
    if odd:
        notes.append(f"sliding_window is {configured}, but upstream lets a query see {odd[0]} tokens; so does apply")
    elif configured and getattr(config, "use_sliding_window", True) and not any(windows):
        notes.append(
            f"sliding_window is {configured}, but upstream applies none with this implementation; neither does apply"
        )
    if any(depends_on_length(module) for module in model.modules()):
        notes.append(
            "the rotary depends on a length: each example of a packed row is rotated by its own, not the row's"
        )
    if patch is None:
        return notes
    if patch.quirks is not None:
        notes += patch.quirks(config)
    version = versions.transformers_version()
    if not versions.inside(version, patch.transformers):
        notes.append(f"transformers {version} is outside the tested range {patch.transformers}; rely on verify")
    return notes
