"""What the last layer computes for each token by itself, on labelled tokens only: nobody reads what the others give.

A head on labelled tokens leaves the other hidden states of the last layer unread. Keys and values of all tokens are
needed there; the projection of what attention gives, and the MLP, are not. They run on the rows that predict a label:

    (B, T, D)   ->   rows (1, N, D)   ->   projection or MLP   ->   (B, T, D), zeros but in N rows

Only where nothing else can be read: code of upstream's and PyTorch's own from there on, no hooks, nobody who asks for
hidden states. Layers that gradient checkpointing runs again stay whole, as they would find no rows then, and so does
what torch.compile traces.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..errors import PadfreeError
from ..wrapping.call import Call
from ..wrapping.frames import frames_are_compiled, is_tracing, runs_uncompiled
from ..wrapping.opt_in import OptIn
from ..wrapping.seam import Answer
from .code_of import is_code_of
from .hand_over import LabelledTokens, Selected
from .under_way import under_way

_MOST = 0.9
"""Share of labelled tokens up to which rows are taken out: above, the copies cost more than the rows that they save."""

_THEIRS = ("transformers.", "torch.nn.", "torch.utils.", f"{__name__.partition('.')[0]}.")
"""How the modules of code begin that does nothing with hidden states but what upstream's model does."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_hooks_of_saved_tensors: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_looks_at_all: Any = getattr(nn.modules.module, "_has_any_global_hook", lambda: True)
"""Whether there is a hook on all modules. Private to PyTorch, like the other, which has no public way to ask: of a
version without them, all layers stay whole."""


@runs_uncompiled
def on_labelled_rows(answer: Answer, call: Call) -> object:
    """Answers the call of a decoder, whose last layer runs on the tokens that the head waits for, as far as it can."""
    if is_tracing() or frames_are_compiled():
        return answer(call)
    handed, handles = under_way.handed, []
    if isinstance(handed, Selected) and (modules := _modules(call, handed.tokens)):
        runs = _Runs(handed)
        narrow = (handle for module in modules for handle in _Narrow(runs).around(module))
        handles = [*runs.around(call.module.layers[-1]), *narrow]
    try:
        return answer(call)
    finally:
        for handle in handles:
            handle.remove()


class _Runs:
    """Hooks that note whether the last layer runs: what is in it may also be part of others, or called by a hook."""

    def __init__(self, handed: Selected):
        self.handed = handed
        self.now = self.narrowed = False

    def around(self, layer: nn.Module) -> tuple[Any, Any]:
        return layer.register_forward_pre_hook(self._before), layer.register_forward_hook(self._after)

    def _before(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if under_way.handed is not self.handed:
            return
        if self.narrowed:  # for somebody else, as in a hook that calls the model again, who may have read all rows
            raise PadfreeError(
                f"{type(layer).__name__}, the last layer, ran twice in a forward, and the first time on labelled "
                "tokens only; call padfree_patch.apply(model) with logits='all'"
            )
        self.now = True

    def _after(self, layer: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if under_way.handed is self.handed:
            self.now = False


class _Narrow:
    """Hooks that give a module some rows in the place of all tokens, in the thread that the head runs in."""

    def __init__(self, runs: _Runs):
        self._runs, self._tokens = runs, runs.handed.tokens
        self._narrows = False

    def around(self, module: nn.Module) -> tuple[Any, Any]:
        return module.register_forward_pre_hook(self._before), module.register_forward_hook(self._after)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> Tensor | None:
        if not self._is_awaited():
            return None
        is_whole = len(args) == 1 and args[0].shape[:2] == self._tokens.predicted.shape
        self._narrows = is_whole and not _may_run_again()
        self._runs.narrowed |= self._narrows
        return args[0].flatten(0, 1).index_select(0, self._rows(args[0]))[None] if self._narrows else None

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self._is_awaited() or not self._narrows:
            return None
        shape = self._tokens.predicted.shape
        zeros = output.new_zeros(shape.numel(), output.shape[-1])
        return zeros.index_copy(0, self._rows(output), output[0]).unflatten(0, shape)

    def _is_awaited(self) -> bool:
        return not is_tracing() and under_way.handed is self._runs.handed and self._runs.now

    def _rows(self, like: Tensor) -> Tensor:
        return self._tokens.rows.to(like.device, non_blocking=True)


def _may_run_again() -> bool:
    """Whether gradient checkpointing runs, of either kind, or something else that looks at what a layer saves."""
    return not torch.is_grad_enabled() or _hooks_of_saved_tensors is None or _hooks_of_saved_tensors(False) is not None


def _modules(call: Call, tokens: LabelledTokens) -> list[nn.Module]:
    """Returns the modules to narrow; none if all tokens are wanted, or somebody may look at what they give."""
    decoder, asked = call.module, call.arguments.get("output_hidden_states")
    some = 0 < len(tokens.rows) < _MOST * tokens.predicted.numel()
    if not some or asked or getattr(decoder.config, "output_hidden_states", False) or not _is_known(decoder):
        return []
    *before, last = decoder.layers
    mlp, attention = getattr(last, "mlp", None), getattr(last, "self_attn", None)
    if mlp is None or attention is None or last in before or not all(map(_is_upstreams, before)):
        return []
    projection = getattr(attention, "o_proj", None)
    inside = {*attention.modules()} - {attention, projection}  # which read nothing of what is left out
    after = {*_from_last_layer_on(decoder)}
    if not _is_of_linear(mlp) or any(map(_is_looked_at, after)) or not all(map(_is_upstreams, after - inside)):
        return []
    if _looks_at_all():
        return []
    return [mlp, projection] if _is_linear(projection) else [mlp]


def _is_known(decoder: nn.Module) -> bool:
    """Whether a patch says how the decoder works: of a way that was found, nobody knows how often a layer runs.

    Nor does anybody of layers in a list of a type of its own.
    """
    opt_in, layers = OptIn.of(decoder), getattr(decoder, "layers", None)
    return opt_in is not None and not opt_in.way and type(layers) is nn.ModuleList and len(layers) > 0


def _is_upstreams(module: nn.Module) -> bool:
    """Whether all that a module runs is upstream's or PyTorch's: somebody's own may read all that it computes."""
    own = (each for each in vars(module).values() if callable(each))
    is_theirs = f"{type(module).__module__}.".startswith(_THEIRS)
    functions = (type(module).forward, type(module).__call__, *own)
    return is_theirs and all(is_code_of(_THEIRS, each) for each in functions)


def _is_of_linear(mlp: nn.Module) -> bool:
    """Whether an MLP has linear layers, and no other weights: a router's loss would need all tokens."""
    own = {id(each) for child in mlp.children() if _is_linear(child) for each in child.parameters()}
    return bool(own) and all(id(each) in own for each in (*mlp.parameters(), *mlp.buffers()))


def _is_linear(module: object) -> TypeGuard[nn.Linear]:
    """Whether a module multiplies each token by a plain matrix; one of a type of its own may scale by all tokens."""
    return type(module) is nn.Linear and all(type(each) in (Tensor, nn.Parameter) for each in module.parameters())


def _from_last_layer_on(decoder: Any) -> Iterator[nn.Module]:
    yield decoder
    for child in decoder.children():
        if not isinstance(child, nn.Embedding) and child is not decoder.get_input_embeddings():
            yield from (child[-1] if child is decoder.layers else child).modules()


def _is_looked_at(module: nn.Module) -> bool:
    """Whether a module has a hook, or was compiled by itself."""
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    return compiled or any(getattr(module, name, None) for name in _HOOKS)
