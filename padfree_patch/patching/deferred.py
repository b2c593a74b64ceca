"""apply for a model whose training begins later, elsewhere: it is patched now and verified then.

Weights need not be there, nor on the device that trains, and nothing is run.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .. import attention
from ..adapters import check_adapters
from ..registry import found_by_check, patch_for
from ..wrapping.opt_in import OptIn
from .found import enter_first_way
from .plan import enter_patch
from .state import State


def apply_deferred(model: nn.Module, *, backend: str, check: Callable[[nn.Module], None]) -> None:
    """Patches a model as `apply` does, but verifies nothing: `check` is called in its first packed training call.

    A model whose way only a check shows is entered in the first way that would be tried; any packed call of it is
    checked first, because nothing has shown that this way is right. `check` is pickled by name, with the model.

    Raises PadfreeError, with the model as it was, if nothing in it can be entered.
    """
    attention.check_name(backend)
    patch = patch_for(model)
    check_adapters(model)
    before = State(model)
    try:
        if patch is None or patch.any_decoder:
            enter_first_way(model, before, backend)
        else:
            enter_patch(model, patch, before.opt_ins, backend)
        for mine in OptIn.all_in(model).values():
            mine.check, mine.pending, mine.unproven = check, True, found_by_check(patch)
    except BaseException:
        before.put_back()
        raise
