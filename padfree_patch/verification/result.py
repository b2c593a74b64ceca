"""What `verify` measured, and what it says about a model."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from ..errors import LeakError, PadfreeError
from ..html_table import html_table
from ..upstream import Arguments

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` measured. True in a condition if examples do not mix."""

    model: str
    """Class of the model."""
    logit_change: float = math.nan
    """Largest change of B's logits when A changes; 0 if isolated."""
    change_tolerance: float = 0.0
    """What `logit_change` may be: 0, except for mixtures of experts (`rounding_of_neighbours`)."""
    leaked_gradient: float = math.nan
    """Largest gradient of B's loss at A's embeddings, absolute; 0 if isolated."""
    alone_error: float = math.nan
    """Largest difference between packed and alone, relative to the largest logit."""
    alone_tolerance: float = math.nan
    """What `alone_error` may be in the model's dtype."""
    alone_refused: str | None = None
    """Why there is nothing to compare with, if upstream can't run an example alone (`Patch.upstream_refuses`)."""
    first_leak: str | None = None
    """Name of the first module whose output at B changes with A although its input at B does not."""
    first_difference: str | None = None
    """Name of the first module that, for the same input, gives B something else in the packed row than alone."""
    examples: int = 0
    """How many of a given batch were compared with each alone; then the two leak probes were not made."""
    labelled_error: float = math.nan
    """Largest relative difference of loss and gradients from those with all logits; NaN if all are computed."""
    labelled_tolerance: float = math.nan
    """What `labelled_error` may be in the model's dtype."""
    labelled_failed: str | None = None
    """The error of a call that computes the logits of labelled tokens only, if it raises one."""
    skipped: str | None = None
    """Why nothing could be measured, if so."""

    @property
    def isolated(self) -> bool:
        """Says whether both leak probes came out as they must; of a given batch, whether all examples did."""
        if self.examples:
            return self.alone_error <= self.alone_tolerance
        return self.logit_change <= self.change_tolerance and self.leaked_gradient == 0

    @property
    def finite(self) -> bool:
        """Says whether what was measured are numbers that tell a leak from none."""
        return self._not_finite() is None

    def _not_finite(self) -> str | None:
        """Names what has NaN or infinity, so that nothing can be said; a leak that the logits show is one anyway."""
        if self.examples:
            return None if math.isfinite(self.alone_error) else "logits"
        if not (math.isfinite(self.logit_change) and (self.alone_refused or math.isfinite(self.alone_error))):
            return "logits"
        logits_stay = self.logit_change <= self.change_tolerance
        return "gradients" if logits_stay and not math.isfinite(self.leaked_gradient) else None

    @property
    def ok(self) -> bool:
        """Says whether examples do not mix, each gives what it gives alone, and labelled logits what all give."""
        return self._exact and self._labelled_exact

    @property
    def _exact(self) -> bool:
        return self.isolated and (bool(self.alone_refused) or self.alone_error <= self.alone_tolerance)

    @property
    def _labelled_exact(self) -> bool:
        compared = not math.isnan(self.labelled_tolerance)
        return self.labelled_failed is None and (not compared or self.labelled_error <= self.labelled_tolerance)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.model}: not verified: {self.skipped}"
        if what := self._not_finite():
            return (
                f"{self.model}: the {what} are not finite, so nothing can be said about leaks; look for NaN in the "
                "weights and for values that the dtype can't hold. verify on the unpatched model says whether they are "
                "upstream's own"
            )
        return "\n".join(
            [f"{self.model}: {self._verdict()}", *(f"  {name:38} {found}" for name, found in self._figures())]
        )

    def _repr_html_(self) -> str:
        """Shows the figures as a table in a notebook."""
        if self.skipped or not self.finite:
            return html_table(str(self), [])
        return html_table(f"{self.model}: {self._verdict()}", self._figures(), good=self.ok)

    def _verdict(self) -> str:
        if self.examples:
            return f"{self.examples} examples of a batch: " + (
                "each as alone" if self.ok else "NOT WHAT EACH GIVES ALONE"
            )
        if self.ok:
            return "examples do not mix"
        return "WRONG RESULT" if self.isolated else "EXAMPLES MIX"

    def _figures(self) -> list[tuple[str, str]]:
        allowed = f"at most {self.change_tolerance:.3g}" if self.change_tolerance else "must be 0"
        figures = (
            []
            if self.examples
            else [
                ("change of B's logits when A changes", f"{self.logit_change:.3g} ({allowed})"),
                ("gradient of B's loss at A's embeddings", f"{self.leaked_gradient:.3g} (must be 0)"),
            ]
        )
        if self.alone_refused:
            figures.append(("not compared with alone", f"upstream fails there: {self.alone_refused}"))
        else:
            allowed = f"at most {self.alone_tolerance:.3g}"
            figures.append(("packed against alone, relative", f"{self.alone_error:.3g} ({allowed})"))
        if self.labelled_failed:
            figures.append(("with logits of labelled tokens", self.labelled_failed))
        elif not math.isnan(self.labelled_tolerance):
            allowed = f"at most {self.labelled_tolerance:.3g}"
            figures.append(("loss and gradients, labelled and all", f"{self.labelled_error:.3g} ({allowed})"))
        if self.first_leak:
            figures.append(("first module that leaks", self.first_leak))
        if self.first_difference:
            figures.append(("first module that differs from alone", self.first_difference))
        return figures

    def as_dict(self) -> dict[str, str | float | None]:
        """Gives every field and `ok`, ready for JSON: a number that is not finite becomes None."""
        values = dataclasses.asdict(self) | {"ok": self.ok}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

    def of(self, model: nn.Module) -> Verification:
        """Remembers the model that was measured, as long as it lives, for `plot`. Returns itself."""
        object.__setattr__(self, "_measured", weakref.ref(model))
        return self

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_measured"}

    def plot(self) -> Figure:
        """Draws which token of a packed row sees which, on the model that was verified, as a matplotlib figure.

        The row is that of the probes, two examples of nine and eight tokens. It is run again for the picture, on the
        model as it is now: draw before `apply` or `restore` changes it.

        Raises PadfreeError if matplotlib is not installed, nothing was measured, the model is gone, or it has changed
        so that its examples mix now and did not, or the other way round.
        """
        from ..pictures.packed_row import draw
        from .sight import look

        model = vars(self).get("_measured", lambda: None)()
        if self.skipped or model is None:
            reason = self.skipped or "the model that was verified is gone; keep it, or call verify again"
            raise PadfreeError(f"no picture of {self.model}: {reason}")
        sight = look(model)
        if not math.isnan(self.leaked_gradient) and bool(sight) != (self.leaked_gradient == 0):
            raise PadfreeError(
                f"no picture of {self.model}: it has changed since it was verified (examples "
                f"{'did not mix' if self.leaked_gradient == 0 else 'mixed'} then); call verify again, and plot that"
            )
        return draw({f"{self.model}: {self._verdict()}": sight})

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> Verification:
        """Makes a `Verification` of what `as_dict` gave; names that are no fields are ignored."""
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        given: Arguments = {name: value for name, value in fields.items() if name in defaults}
        missing = {name: math.nan for name, v in given.items() if v is None and isinstance(defaults[name], float)}
        return cls(**given | missing)

    def error(self, subject: str, *, outcome: str = "") -> PadfreeError:
        """Makes the error for a result that is not `ok`: what is wrong with the subject, the outcome, and the report.

        A LeakError if examples mix or come out wrong; a plain PadfreeError if nothing can be said about that.
        """
        kind, problem = self._problem()
        return kind(f"{subject} {problem}{outcome and '; '}{outcome}\n{self}")

    def _problem(self) -> tuple[type[PadfreeError], str]:
        if self.skipped:
            return PadfreeError, "was not verified"
        if what := self._not_finite():
            return PadfreeError, f"gives {what} that are not finite"
        if not self.isolated:
            return LeakError, "does not isolate its examples"
        if self._exact:
            return PadfreeError, "gives another loss with the logits of labelled tokens only than with all"
        return LeakError, "isolates its examples, but does not give what each gives alone"

    def raise_if_leaking(self) -> None:
        """Raises an error with the whole report unless `ok`: a LeakError, or a PadfreeError if nothing was measured."""
        if not self.ok:
            raise self.error(self.model)
