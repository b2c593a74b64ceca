"""The check that `apply` makes of its work, and the line that says what came of it."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence

from torch import nn

from .. import verification
from ..models import pretrained_modules
from ..seams.kernel import recording_backends
from ..verification import Verification
from ..wrapping.opt_in import OptIn
from .notebook import show_line

logger = logging.getLogger("padfree_patch")


@dataclasses.dataclass(frozen=True)
class Check:
    """What `verify` measured on a patched model, and by which means the model was run."""

    result: Verification
    backends: tuple[str, ...]
    """The attention backends that answered; none if upstream's own attention ran on each sequence."""
    seconds: float

    def __str__(self) -> str:
        return str(self.result)


def check(model: nn.Module, training: Sequence[nn.Module] = ()) -> Check:
    """Verifies a patched model, with some of its modules in training mode. Raises what the model raises."""
    start = time.perf_counter()
    with recording_backends() as backends:
        result = verification.verify_in_training(model, training) if training else verification.verify(model)
    return Check(result, tuple(sorted(backends)), time.perf_counter() - start)


def say_applied(model: nn.Module, checked: Check | None) -> None:
    """Writes one line to the log, at level INFO, which a notebook's cell that ends with `apply` shows too.

    Args:
        model: what was patched.
        checked: what was measured; None if nothing was.
    """
    mine = next(iter(OptIn.all_in(model).values()))
    parts = [mine.way or f"patch {mine.model_type}"]
    if checked is None:
        parts.append("not verified")
    else:
        parts.append(f"backend {', '.join(checked.backends)}" if checked.backends else "upstream's own attention")
        parts.append(f"verified in {1000 * checked.seconds:.0f} ms")
    line = f"{type(pretrained_modules(model)[0]).__name__}: {', '.join(parts)}"
    logger.info(line)
    show_line(model, line)
