"""Which modules of a model are patched, and how: taken before something changes it, and put back afterwards."""

from __future__ import annotations

from torch import nn

from ..any_decoder.noted_mask import recipes
from ..batch.packed_batch import known_batches
from ..seams.window import measured
from ..wrapping.opt_in import OptIn, living, remove_unused_seams
from ..wrapping.seam import lock


class State:
    """What every module of a model has opted in with."""

    def __init__(self, model: nn.Module):
        self._model = model
        self.opt_ins = OptIn.all_in(model)
        self._values = {opt_in: dict(vars(opt_in)) for opt_in in self.opt_ins.values()}

    def take_off(self) -> None:
        """Makes every module as if it had never been patched, until it is put back."""
        with lock:
            for module, opt_in in self.opt_ins.items():
                _exchange(module, opt_in, None)
        remove_unused()

    def put_back(self) -> None:
        """Makes every module patched as it was, or unpatched if it was not, whatever happened in between."""
        with lock:
            now = OptIn.all_in(self._model)
            for module in now | self.opt_ins:
                _exchange(module, now.get(module), self.opt_ins.get(module))
            for opt_in, values in self._values.items():
                vars(opt_in).update(values)
        remove_unused()


def _exchange(module: nn.Module, now: OptIn | None, before: OptIn | None) -> None:
    if now is before:
        return
    if now is not None:
        living.discard(now)  # an error's own frames may hold it, which would keep the seams
        OptIn.detach(module)
    if before is not None:
        living.add(before)
        for seam in before.seams:
            seam.install()
        before.attach(module)


def remove_unused() -> None:
    """Puts back what no model needs any more, and with the last model forgets what was read and measured."""
    remove_unused_seams()
    if not living:
        known_batches.clear()
        measured.clear()
        recipes.clear()
