"""Modules that run their own forward on each sequence: whatever mixes tokens and is no plain attention.

Those that are handed the stand-in for the mask are told by it what the row holds. Those that `verify` names, such as
position embeddings that count by themselves, are told by the model's forward, which must run around them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..batch.packed_batch import PackedBatch
from ..errors import PadfreeError
from ..seams.answers import note_answer
from ..seams.kinds import Found
from ..seams.rotary import as_new
from ..seams.under_way import nothing_running, under_way
from ..upstream import Arguments
from ..verification.untouched import states_put_back
from ..wrapping.call import Call
from ..wrapping.opt_in import OptIn
from ..wrapping.seam import Seam
from .cutting import Cutter
from .noted_mask import batch_of, find_noted, is_noted
from .way import Way

NAME = "mixers"


def find(model: nn.Module, way: Way) -> Found:
    modules = tuple(each for each in model.modules() if type(each) in way.split | way.named)
    seams = {Seam(each, "forward", concerns, answer) for each in way.split - way.named}
    seams |= {Seam(each, "forward", concerns_named, answer_named) for each in way.named}
    return Found(frozenset(seams), modules)


def concerns(args: tuple[object, ...], kwargs: Arguments) -> bool:
    return find_noted((*args, *kwargs.values())) is not None and OptIn.of(args[0]) is not None


def concerns_named(args: tuple[object, ...], kwargs: Arguments) -> bool:
    if OptIn.of(args[0]) is None:
        return False
    if under_way.batch is not None or find_noted((*args, *kwargs.values())) is not None:
        return True
    _check_not_run_again(args[0])
    return False


@torch.compiler.disable
def answer(call: Call) -> object:
    """Answers the forward of a module that is handed the stand-in for the mask."""
    return on_each(call, batch_in(call))


@torch.compiler.disable
def answer_named(call: Call) -> object:
    """Answers the forward of a module that `verify` named; without a mask, it counts its positions by itself."""
    batch = under_way.batch or batch_in(call)
    positions = call.arguments.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() > 1 and find_noted(call.arguments.values()) is None:
        call = call.changed(position_ids=None)  # those of a packed row; alone it would have counted them itself
    return on_each(call, batch)


def _check_not_run_again(module: object) -> None:
    """Raises PadfreeError if a module is run again in a backward after a packed call: nothing tells it the batch."""
    opt_in = OptIn.of(module)
    if opt_in is not None and opt_in.answered and torch._C._current_graph_task_id() != -1:
        raise PadfreeError(
            f"{type(module).__name__} runs again in a backward (gradient checkpointing), where nothing says what the "
            "packed row held; train this model without checkpointing, or on padded batches"
        )


def batch_in(call: Call) -> PackedBatch:
    """Returns the batch that the stand-in among the arguments carries."""
    mask = find_noted(call.arguments.values())
    assert mask is not None  # or the call would not have concerned us
    tensors = (each for each in call.arguments.values() if isinstance(each, Tensor) and not is_noted(each))
    return batch_of(mask, next((each.device for each in tensors), mask.device))


def on_each(call: Call, batch: PackedBatch) -> object:
    """Runs a module's own forward on each sequence, and joins the results."""
    module, cutter = call.module, Cutter(batch, call.module)
    arguments = {name: value for name, value in call.arguments.items() if value is not module}
    with nothing_running():
        results = cutter.run(arguments, lambda cut: _alone(call, cut))
    note_answer(module)
    if opt_in := OptIn.of(module):
        opt_in.answered = 1
    return cutter.join(results)


def _alone(call: Call, cut: Arguments) -> object:
    """Runs upstream's forward on one sequence, which leaves no state behind for the next one.

    A rotary inside that looks at a length would remember the longest; the seam of those outside is not told of it here.
    """
    with as_new(call.module), states_put_back(call.module):
        return call.changed(**cut).proceed()
