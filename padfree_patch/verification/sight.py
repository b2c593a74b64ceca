"""Which token of a packed row sees which, measured on the model: what the pictures of a packed row are drawn from."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from ..errors import PadfreeError
from .probe import LENGTHS, Probe
from .untouched import untouched, unwrapped, why_it_cannot_run

SEES, SEES_OTHER, NOT = "x", "!", "."
"""What a picture in letters shows of a token: it reaches the outputs, of its own example or of another one, or not."""


@dataclasses.dataclass(frozen=True)
class Sight:
    """Which token of a packed row sees which. True in a condition if none sees a token of another example."""

    lengths: tuple[int, ...]
    """Tokens of each example."""
    rows: tuple[str, ...]
    """A line per token of the row: x for each token that its outputs depend on, and a dot for each other one."""

    @property
    def owners(self) -> list[int]:
        """The example of each token."""
        return [example for example, length in enumerate(self.lengths) for _ in range(length)]

    def mixed_pairs(self) -> int:
        """Counts the pairs in which a token sees one of another example."""
        return str(self).count(SEES_OTHER)

    def __bool__(self) -> bool:
        return not self.mixed_pairs()

    def __str__(self) -> str:
        """Draws the row in letters: x sees, ! sees a token of another example, . does not see."""
        owners = self.owners
        return "\n".join(
            "".join(
                NOT if seen == NOT else SEES if owners[token] == owners[other] else SEES_OTHER
                for other, seen in enumerate(row)
            )
            for token, row in enumerate(self.rows)
        )


def look(model: nn.Module, *, use_cache: bool | None = None) -> Sight:
    """Measures which token sees which in the packed row of the probes, on the model as it is now.

    A token sees another one if the gradient of its outputs at the other's embedding is not zero, so nothing is known of
    masks. Takes one forward and a backward for each of the seventeen tokens, and leaves no trace.

    Args:
        model: patched or not.
        use_cache: what the call says; None says nothing, as in `model(**batch)`. The Trainer says False.

    Raises PadfreeError if the model can't be run, or gives values that are not finite.
    """
    if reason := why_it_cannot_run(model):
        raise PadfreeError(f"no picture of {type(model).__name__}: {reason}")
    with untouched(model), torch.inference_mode(False), torch.enable_grad():
        gradients = Probe(unwrapped(model)).gradients(use_cache=use_cache)
    if not gradients.isfinite().all():
        raise PadfreeError(
            f"no picture of {type(model).__name__}: its gradients are not finite, so nothing shows which token sees "
            "which; look for NaN in the weights"
        )
    rows = ("".join(SEES if seen else NOT for seen in row) for row in (gradients != 0).tolist())
    return Sight(LENGTHS, tuple(rows))
