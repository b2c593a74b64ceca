"""Attention functions of transformers' interface (4.48 on) in a model that no patch is registered for.

Plain ones are answered by a varlen backend: chunks are just shorter sequences, and sinks are plain where the backend
knows them. Of what is special (softcaps, a bias, a gate, an eager function that is not Llama's) nothing need be known:
upstream's own function runs on each sequence.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from .. import attention
from ..batch.packed_batch import PackedBatch
from ..batch.sequences import PackedSequences
from ..models import implementation_of
from ..seams.answers import note_answer
from ..seams.flash_attn import window_surplus
from ..seams.interface import EAGER, SINKS, SPECIAL, mapping_seams, namespace_of
from ..seams.kernel import PackedKernel
from ..seams.kinds import Found
from ..seams.stand_in import Recipe as Window
from ..upstream import Arguments, Function
from ..wrapping.call import Call
from ..wrapping.opt_in import OptIn
from ..wrapping.seam import Seam, original_of
from .cutting import Cutter
from .noted_mask import Recipe, batch_of, is_noted, recipe_of
from .sinks import sinks_in, takes_sinks
from .way import Way

NAME = "interface"

_KNOWN_TENSORS = ("position_ids", "cache_position", "position_embeddings", "cos", "sin")
"""Tensors that some layers hand on and no attention function reads."""


def find(model: nn.Module, way: Way) -> Found:
    files = {namespace_of(each) for each in way.fast}
    seams = {Seam(each, EAGER, concerns, answer) for each in files if hasattr(sys.modules[each], EAGER)}
    for implementation in {implementation_of(each.config) for each in way.models}:
        for file in files:
            seams |= mapping_seams(file, implementation, answer, concerns)
    return Found(frozenset(seams), way.fast)


def concerns(args: tuple[object, ...], kwargs: Arguments) -> bool:
    return is_noted(args[4] if len(args) > 4 else kwargs.get("attention_mask"))


@torch.compiler.disable
def answer(call: Call) -> tuple[Tensor, None]:
    """Answers an attention function: tensors (B, heads, T, D) in, (B, T, H, D) and no weights out."""
    module, q, mask = (call.arguments[call.names[place]] for place in (0, 1, 4))
    batch, recipe = batch_of(mask, q.device), recipe_of(mask)
    # The chunks of an example that goes on from a shared prompt are not those of the row.
    plain = is_plain(call, recipe) and not (recipe.kind == "chunk" and batch.sequences.prefixes)
    if (opt_in := OptIn.of(module)) is not None:
        opt_in.special = not plain
    if plain:
        return _by_kernel(call, batch, recipe), None
    note_answer(module)
    cutter = Cutter(batch, module, dict.fromkeys(call.names[1:4], 2), scores=True)
    arguments = {name: value for name, value in call.arguments.items() if value is not module}

    def run(cut: Arguments) -> Tensor:
        if cut[call.names[4]] is None and cut.get("is_causal") is False:
            cut = {**cut, "is_causal": None}  # the layer saw a stand-in: alone it has no mask, and leaves it to this
        output: Tensor = call.changed(**cut).proceed()[0]
        return output

    results = cutter.run(arguments, run)
    output = torch.cat(cutter.without_prompts(results, 1), dim=1)  # (1, B * T, H, D)
    return output.view(q.shape[0], -1, *output.shape[2:]), None


def is_plain(call: Call, recipe: Recipe) -> bool:
    """Whether a varlen backend computes what the function would: softmax attention, masked as the recipe says."""
    given = call.with_defaults()
    module, name = given[call.names[0]], call.original.__name__
    flash = "flash" in name
    sinks = SINKS if takes_sinks(call) else ()
    special = [each for each in (*SPECIAL, *(() if flash else ("softcap",))) if given.get(each) is not None]
    special = [each for each in special if each not in sinks]
    known = (*call.names[:5], *_KNOWN_TENSORS, *sinks)
    unknown = [
        each for each, value in given.items() if isinstance(value, Tensor) and each not in known and value.dim() > 0
    ]
    causal = given.get("is_causal") is not False and getattr(module, "is_causal", True) is not False
    if special or unknown or not causal or (recipe.kind == "other" and not flash):
        return False
    if sinks:
        return sinks_in(given) is None or _backend_takes_sinks(module, given[call.names[1]])
    return "eager" not in name or _is_llamas(call.original)


def _backend_takes_sinks(module: nn.Module, q: Tensor) -> bool:
    """Whether the backend that a module is patched with takes sinks; if not, upstream's function runs as ever."""
    opt_in = OptIn.of(module)
    needs = attention.Needs(q.device.type, q.dtype, q.shape[3], sinks=True)
    return attention.find(needs, opt_in.backend if opt_in else "auto") is not None


def _is_llamas(function: Function) -> bool:
    """Whether an eager attention function does what Llama's does, instruction by instruction."""
    from transformers.models.llama import modeling_llama

    mine, llamas = (_innermost(each).__code__ for each in (function, modeling_llama.eager_attention_forward))
    return (mine.co_code, mine.co_names, mine.co_consts) == (llamas.co_code, llamas.co_names, llamas.co_consts)


def _innermost(function: Function) -> Function:
    while (original := original_of(function)) is not function:
        function = original
    return function


def _by_kernel(call: Call, batch: PackedBatch, recipe: Recipe) -> Tensor:
    given = call.with_defaults()
    module, q, k, v = (given[name] for name in call.names[:4])
    window = recipe.size if recipe.kind == "window" else 0
    if "flash" in call.original.__name__:
        size = given.get("sliding_window")
        window = size + window_surplus() if size else 0
    sequences = chunked(batch.sequences, recipe.size) if recipe.kind == "chunk" else batch.sequences
    opt_in = OptIn.of(module)
    kernel = PackedKernel(module, sequences, Window(window), opt_in.backend if opt_in else "auto")
    dropout = float(given.get("dropout") or 0.0)
    softcap = float(given.get("softcap") or 0.0)
    sinks = sinks_in(given)
    output = kernel.attend(q, k, v, scale=given.get("scaling"), dropout=dropout, softcap=softcap, sinks=sinks)
    return output.transpose(1, 2).contiguous()


def chunked(sequences: PackedSequences, size: int) -> PackedSequences:
    """Returns the chunks of `size` tokens of sequences, as sequences. No device sync.

    >>> chunked(PackedSequences.from_lengths([5, 2]), 4).lengths
    (4, 1, 2)
    """
    key = f"chunks of {size}"
    if key not in sequences.derived:
        lengths = [min(size, n - start) for n in sequences.lengths for start in range(0, n, size)]
        device = sequences.kernel_cu_seqlens().device
        sequences.derived[key] = PackedSequences.from_lengths(lengths, device=device)
    chunks: PackedSequences = sequences.derived[key]
    return chunks
