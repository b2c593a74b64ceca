"""What decoder and head share: the batch of a call is read once, and ordinary calls are left alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Adapters, adapters_of, check_what_rows_are_told, is_told_rows, why_own_not_packed
from ..batch.lengths import LENGTH_ARGUMENTS
from ..batch.packed_batch import PackedBatch, batch_of_copy, read_batch
from ..errors import PadfreeError
from ..upstream import Arguments
from ..wrapping.call import Call, takes_unnamed
from ..wrapping.frames import is_tracing, outside_graphs, runs_uncompiled
from ..wrapping.opt_in import OptIn
from ..wrapping.seam import Answer, Concerns, Seam, Traced, is_wrapper, original_of
from .found_ordinary import is_found_ordinary, is_handed_on
from .full_rows import look_at_bare_call, settle
from .hand_over import is_awaited
from .jump import say_jump
from .pooled import pools
from .shared_prompts import check_can_share, take_tokens
from .stand_in import is_stand_in
from .tracing import check_not_traced, is_exporting, is_jit_tracing, readable, reading
from .under_way import under_way

CACHE_ARGUMENTS = ("past_key_values", "cache")
"""What a model's forward calls its cache; the second name is new in 5.24, where the first goes on until 5.40."""


def concerns(args: tuple[Any, ...], kwargs: Arguments) -> bool:
    """Whether the call of a model's forward must be looked at: it is a patched model's, and may be packed.

    Looks at no values, and is traced by torch.compile: ordinary calls stay one graph. A decoder's call that already
    carries our stand-in passes too: an outer wrapper of ours has prepared it.
    """
    opt_in = OptIn.of(args[0])
    if opt_in is None or is_exporting():
        return False
    if opt_in.logits != "all" and (kwargs.get("labels") is not None or is_awaited(args[0])):
        return True
    if is_stand_in(kwargs.get("attention_mask")) or (is_tracing() and is_handed_on(args[0], kwargs)):
        return False
    tokens = args[1] if len(args) > 1 else kwargs.get("input_ids")
    if tokens is not None and not isinstance(tokens, Tensor):
        return False  # traced by torch.fx, whose proxies have no values; or upstream says what is wrong
    if len(args) > 2 or any(name in kwargs for name in LENGTH_ARGUMENTS) or is_jit_tracing():
        return True  # while it traces, looking at a shape is a warning
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        return False  # upstream says what is wrong
    if tokens.shape[0] == 0 or tokens.shape[1] == 0:
        return True
    if tokens.shape[1] == 1:  # as in every step of generate but the first
        return False
    if kwargs.get("position_ids") is None and kwargs.get("attention_mask") is None:
        look_at_bare_call(args[0], tokens)
        return False
    return True


def seams_of(
    model: nn.Module,
    answer: Answer,
    entry: Answer,
    shown: Callable[[type], tuple[str, ...]] = lambda _: (),
    concerned: Concerns | None = None,
    traced: Traced | None = None,
) -> set[Seam]:
    """Returns the seams of a model's forward, and of `__call__`, which reaches us if somebody replaces the forward.

    Of a forward that takes its arguments as `*args`, the next one among the bases as well, which names them. `shown`
    says what the signature of a class's forward shows beside its own: the same for every model that has the class.
    """
    concerned = concerned or concerns
    forwards = [base for base in type(model).__mro__ if "forward" in vars(base)]
    entered = [type(model)]
    for base, below in itertools.pairwise(forwards):
        if not takes_unnamed(original_of(vars(base)["forward"])):
            break
        entered.append(below)
    seams = {Seam(each, "forward", concerned, answer, shown(each), traced=traced) for each in entered}
    return seams | {Seam(type(model), "__call__", concerned, entry, traced=traced)}


@torch.compiler.disable(recursive=False)
def enter(call: Call, answer: Answer) -> object:
    """Answers `__call__`: a forward that is not ours, on the class or the instance, gets what ours would have given it.

    Theirs may well call ours, which then finds the batch that was read.
    """
    forward = call.module.forward
    if outside_graphs(is_wrapper, forward):
        return call.proceed()
    by_name = getattr(forward, "__func__", None) or original_of(type(call.module).forward)
    return answer(call.named_like(by_name))


def take_batch(call: Call) -> PackedBatch | None:
    """Returns the packed batch of a call, or None if it is ordinary.

    Takes the lengths out of the arguments, which upstream would refuse. Of a packed call, takes the cache out as well:
    it would be one of several texts at once, so nothing could be generated from it.
    """
    if _is_upstreams(call):
        return None
    lengths = _take_lengths(call.arguments)
    if not lengths and is_found_ordinary(call):
        return None
    batch = (None if lengths else _handed_on(call)) or _read(call, lengths)
    if batch is None:
        if lengths:
            settle(call.module)
        return None
    _check_result(call)
    if is_told_rows(call.arguments):
        check_what_rows_are_told(call.module, call.arguments, len(batch.position_ids), len(batch.sequences.lengths))
    check_can_share(call, batch)
    check_what_is_new(call.module)
    if OptIn.of(call.module) is None:  # the check has left it alone
        return None
    say_jump(call.module, batch)
    call.arguments["position_ids"] = batch.position_ids
    for name in CACHE_ARGUMENTS:
        call.arguments.pop(name, None)
    if call.takes("use_cache"):
        call.arguments["use_cache"] = False
    return batch


def _handed_on(call: Call) -> PackedBatch | None:
    """Returns the batch of the packed forward that calls this one, if this one is handed a copy of its positions.

    What else said where examples end, and may win over the positions, was taken out of the call.
    """
    positions = call.arguments.get("position_ids")
    if under_way.answers is None or not isinstance(positions, Tensor):
        return None
    with reading():
        return batch_of_copy(under_way.answers.batch, positions)


def _is_upstreams(call: Call) -> bool:
    """Whether upstream's own generation makes the call: of a decoding loop, or of continuous batching.

    The second packs requests into a row itself, and its thread calls the model with the places of its cache.
    """
    arguments = call.arguments
    if arguments.get("packed_sequences") is not None:  # which only our collators make
        return False
    return id(call.module) in under_way.generating or "write_index" in arguments


def batch_of_call(call: Call) -> PackedBatch | None:
    """Returns the packed batch of a call, or None if it is ordinary. The call's arguments stay as they are."""
    looked_at = call.changed()
    return _read(looked_at, _take_lengths(looked_at.arguments))


def check_what_is_new(module: nn.Module) -> None:
    """Checks what was not checked before of a model that is called with a packed row: its adapters, or its weights.

    Raises PadfreeError if the adapters can't serve a packed row, or what the check finds, at every such call.
    """
    opt_in, adapters = OptIn.of(module), adapters_of(module)
    if opt_in is None or opt_in.being_checked:
        return
    if reason := why_own_not_packed(module, adapters):
        raise PadfreeError(reason)
    if opt_in.check is not None and _is_new(module, opt_in, adapters):
        opt_in.check(module)
        OptIn.note_checked(module)


def _is_new(module: nn.Module, opt_in: OptIn, adapters: Adapters) -> bool:
    """Whether something was not checked; weights that were not there before are waited for until they are trained."""
    if opt_in.unproven:
        return True
    return module.training and torch.is_grad_enabled() if opt_in.pending else opt_in.must_check(adapters)


def has_something_new(module: nn.Module) -> bool:
    """Whether there is something to be checked if the call of a module, patched or around a patched one, is packed."""
    opt_in, adapters = OptIn.of(module), adapters_of(module)
    if opt_in is None or opt_in.being_checked:
        return False
    if why_own_not_packed(module, adapters) is not None:
        return True
    return opt_in.check is not None and _is_new(module, opt_in, adapters)


def _take_lengths(arguments: Arguments) -> Arguments:
    take_tokens(arguments)
    # From 4.54 on, generate passes flash-attn lengths that are about cache and padding: those stay, in a loop like it.
    generating = _cached_tokens(_cache_of(arguments)) > 0 and arguments.get("attention_mask") is not None
    ours = [name for name in LENGTH_ARGUMENTS if name in arguments and (name == "packed_sequences" or not generating)]
    given = {name: arguments.pop(name) for name in ours}
    return {name: value for name, value in given.items() if value is not None}


def _read(call: Call, lengths: Arguments) -> PackedBatch | None:
    tokens, positions = tokens_of(call.arguments), call.arguments.get("position_ids")
    if not isinstance(tokens, Tensor) or tokens.dim() < 2 or isinstance(positions, list | tuple):
        return None  # upstream says what is wrong
    name, cached = type(call.module).__name__, _cached_tokens(_cache_of(call.arguments))
    with reading():
        if tokens.numel() == 0:
            if lengths:
                raise _empty_input(call, tokens)
            return None
        given = readable(tokens, positions, call.arguments.get("attention_mask"))
        batch = read_batch(
            given.shape,
            tokens.device,
            position_ids=given.position_ids,
            attention_mask=given.attention_mask,
            lengths=lengths,
            generating=cached > 0,
        )
    if batch is None:
        return None
    if cached:
        raise PadfreeError(
            f"{name}: a packed batch ({batch.sequences}) with a cache that holds {cached} tokens; "
            "pass no cache with packed examples, or no restarting positions with a cache"
        )
    check_not_traced(name)
    return batch


@runs_uncompiled
def proceed(call: Call) -> object:
    """Calls upstream. Many versions serve a batch of no tokens.

    Raises PadfreeError, from upstream's own error, if this one does not.
    """
    tokens = tokens_of(call.arguments)
    if tokens is None or is_jit_tracing() or tokens.numel() > 0:
        return call.proceed()
    try:
        return call.proceed()
    except PadfreeError:  # of the decoder inside
        raise
    except Exception as error:
        raise _empty_input(call, tokens) from error


def _empty_input(call: Call, tokens: Tensor) -> PadfreeError:
    return PadfreeError(f"{type(call.module).__name__}: empty input, the tokens have shape {tuple(tokens.shape)}")


@runs_uncompiled
def tokens_of(arguments: Arguments) -> Tensor | None:
    """Returns input_ids (B, T), or inputs_embeds (B, T, D) if those are given instead; None if neither is."""
    tokens: Tensor | None = arguments.get("input_ids")
    return arguments.get("inputs_embeds") if tokens is None else tokens


def _cache_of(arguments: Arguments) -> object:
    """Returns the cache of a call, by whatever name it was given; None without one."""
    return next((cache for name in CACHE_ARGUMENTS if (cache := arguments.get(name)) is not None), None)


def _cached_tokens(cache: Any) -> int:
    """Returns how many tokens a cache holds; 0 for what is none, of which upstream says what is wrong."""
    if hasattr(cache, "get_seq_length"):
        try:
            return int(cache.get_seq_length())
        except ValueError:  # of a recurrent model, which keeps a state and counts nothing (5.0 on)
            return int(cache.has_previous_state())
    if not isinstance(cache, tuple | list):
        return 0
    layer = cache[0] if cache else None  # keys and values, before 4.36
    return int(layer[0].shape[-2]) if isinstance(layer, tuple | list) and layer and layer[0] is not None else 0


def _check_result(call: Call) -> None:
    """Raises PadfreeError if the caller asks for something that a packed call doesn't compute."""
    name, config = type(call.module).__name__, call.module.config
    wants_weights = call.arguments.get("output_attentions")
    if getattr(config, "output_attentions", False) if wants_weights is None else wants_weights:
        raise PadfreeError(
            f"{name}: output_attentions of a packed batch: its weights are never computed; switch it off"
        )
    if needs_rows(call.module) and not pools(call.module):
        raise PadfreeError(
            f"{name} makes its result of all tokens of a row, so a packed row would give one for all its sequences; "
            "call its decoder, and its head on each of padfree_patch.unpack(hidden_states, sequences), or give it a "
            "padded batch, which padfree_patch.integrations.padded.pack_padded(model) computes without its padding"
        )


def needs_rows(module: nn.Module) -> bool:
    """Whether a head makes one result of each row (pooled, or a softmax over its tokens)."""
    return any(head in type(module).__name__ for head in ("ForSequenceClassification", "ForQuestionAnswering"))
