"""Mixers that run once on the whole row: the kernels that they call are told where its sequences begin.

Those of causal_conv1d and mamba_ssm take `seq_idx`, those of fla (flash-linear-attention) `cu_seqlens`, and the mixers
of newer transformers hand them on. Which do is not read anywhere: `verify` tries it, on the device on which it runs,
and a mixer whose examples mix runs on each sequence instead. It also does where the kernels were not tried, as on
another device, and for what they cannot be told: several rows, and prompts that sequences share.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from ..batch.packed_batch import PackedBatch
from ..batch.sequences import PackedSequences
from ..seams.answers import note_answer
from ..seams.kinds import Found
from ..seams.under_way import nothing_running
from ..wrapping.call import Call, takes_keyword
from ..wrapping.opt_in import OptIn
from ..wrapping.seam import Seam, original_of
from . import mixers
from .noted_mask import find_noted
from .way import Way

NAME = "whole_row"

PACKAGES = ("causal_conv1d", "mamba_ssm", "fla")
"""Whose kernels upstream takes where they are installed."""

SEQ_IDX, LENGTHS = "seq_idx", "cu_seq_lens_q"
"""What mixers call the number of each token's sequence, int32 (1, T), and where sequences begin and end, cumulated."""


def with_kernels(ways: list[Way]) -> list[Way]:
    """Puts a way in front, if kernels are installed that the mixers of the fastest may hand lengths on to."""
    if not any(map(importlib.util.find_spec, PACKAGES)):
        return ways
    fastest = ways[0]
    told = frozenset(each for each in fastest.split if _can_be_told(each))
    return [fastest.with_whole(told), *ways] if told else ways


def _can_be_told(cls: type) -> bool:
    """Whether a forward takes what to tell, and its class has code that calls such kernels.

    Whatever else takes any keyword, such as an indexer that chooses keys of long rows, may pass a check of short ones.
    """
    forward = original_of(cast("type[nn.Module]", cls).forward)
    takes = takes_keyword(forward, SEQ_IDX) or takes_keyword(forward, LENGTHS)
    own = [inspect.unwrap(each) for base in cls.__mro__ for each in vars(base).values() if inspect.isfunction(each)]
    codes = [each.__code__ for each in own if inspect.isfunction(each)]  # under a decorator may be no Python function
    return takes and any(not _SIGNS.isdisjoint((*code.co_names, *code.co_varnames)) for code in codes)


_SIGNS = {SEQ_IDX, LENGTHS, "causal_conv1d_fn"}
"""Names in the code of a mixer that calls such kernels."""


def find(model: nn.Module, way: Way) -> Found:
    modules = tuple(each for each in model.modules() if type(each) in way.whole)
    return Found(frozenset(Seam(each, "forward", mixers.concerns, answer) for each in way.whole), modules)


@torch.compiler.disable
def answer(call: Call) -> object:
    """Answers the forward of a mixer that is handed the stand-in for the mask."""
    batch = mixers.batch_in(call)
    if not _is_told(call.module, batch):
        return mixers.on_each(call, batch)
    sequences = batch.sequences
    # In this order: reading the lengths takes off what cu_seqlens may repeat at their end.
    told = {SEQ_IDX: seq_idx_of(sequences), LENGTHS: sequences.kernel_cu_seqlens()}
    masks = dict.fromkeys(name for name, value in call.arguments.items() if find_noted([value]) is not None)
    with nothing_running():
        result = call.changed(None, **masks, **{n: each for n, each in told.items() if call.takes(n)}).proceed()
    note_answer(call.module)
    if opt_in := OptIn.of(call.module):
        opt_in.answered = 1
    return result


def _is_told(module: nn.Module, batch: PackedBatch) -> bool:
    opt_in, positions = OptIn.of(module), batch.position_ids
    tried = opt_in is not None and (opt_in.trying or opt_in.told_on == positions.device.type)
    return tried and positions.shape[0] == 1 and batch.sequences.prefixes is None


def seq_idx_of(sequences: PackedSequences) -> Tensor:
    """Returns the number of each token's sequence, int32 (1, T), on the device of the tokens."""
    if SEQ_IDX not in sequences.derived:
        lengths = torch.tensor(sequences.lengths, device="cpu")
        numbers = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32, device="cpu"), lengths)
        device = sequences.kernel_cu_seqlens().device
        sequences.derived[SEQ_IDX] = numbers.unsqueeze(0).to(device, non_blocking=True)
    return sequences.derived[SEQ_IDX]


def note_device(modules: Iterable[nn.Module], way: Way) -> None:
    """Notes on which device `verify` has shown that the kernels of a way keep examples apart."""
    for module in modules:
        if type(module) in way.whole and (opt_in := OptIn.of(module)):
            opt_in.told_on = next((each.device.type for each in module.parameters()), "")
