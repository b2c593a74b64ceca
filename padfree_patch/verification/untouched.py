"""What a probe needs to run on somebody's model: which module to call, whether it can run, and to leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from ..adapters import why_not_packed
from ..errors import PadfreeError
from ..models import pretrained_modules
from ..wrapping.opt_in import OptIn


def unwrapped(model: nn.Module) -> nn.Module:
    """Takes off what would synchronise with other processes or compile the probe: DDP, torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def why_it_cannot_run(model: nn.Module) -> str | None:
    """Says why no probe can run the model; None if one can."""
    if not pretrained_modules(model):
        return "no transformers model inside"
    if reason := why_not_packed(model):
        return reason
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            return f"parameter {name} is on the meta device"
        if _is_shard(parameter):
            return f"parameter {name} is sharded over processes"
    if _holds_fsdp(model):
        return "the model is sharded over processes (FSDP)"
    return None


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights of a model are spread over processes, also while FSDP runs the model inside of itself.

    There FSDP has put plain tensors in the place of the parameters: a backward through them would be its own.
    """
    if _holds_fsdp(model) or any(map(_is_shard, model.parameters())):
        return True
    embedding = cast(Callable[[], nn.Module], pretrained_modules(model)[0].get_input_embeddings)()
    return not isinstance(next(embedding.parameters(), None), nn.Parameter)


def _holds_fsdp(model: nn.Module) -> bool:
    return any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())


def _is_shard(parameter: Tensor) -> bool:
    return hasattr(parameter, "device_mesh") or (parameter.numel() == 0 and hasattr(parameter, "ds_shape"))


@contextmanager
def untouched(model: nn.Module, training: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Switches dropout and autocast off, and puts back afterwards what a run may change.

    That is the modules' modes, which parameters are trained, the random state, and modules that have buffers: rotary
    tables grow. Those in `training` are in training mode, but not the modules inside of them.

    Raises PadfreeError for a model that a call makes one of another kind, for good.
    """
    devices = {parameter.device for parameter in model.parameters()}
    with ExitStack() as stack:
        stack.enter_context(_kind_put_back(model))
        stack.enter_context(_modes_put_back(model))
        stack.enter_context(_trained_put_back(model))
        stack.enter_context(_buffers_put_back(model))
        stack.enter_context(_unchecked(model))
        if hasattr(torch.compiler, "set_stance"):  # torch 2.6 on; before it, what is compiled inside is compiled again
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(random_state_put_back(model))
        for device_type in {device.type for device in devices}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        for module in model.modules():
            module.training = False
        for module in training:
            module.training = True
        yield


@contextmanager
def random_state_put_back(model: nn.Module) -> Iterator[None]:
    """Lets what a run draws at random be drawn again by the next one, on the CPU and on the model's devices."""
    devices = {parameter.device for parameter in model.parameters()}
    with torch.random.fork_rng(devices=sorted({each.index for each in devices if each.type == "cuda"})):
        yield


@contextmanager
def _trained_put_back(model: nn.Module) -> Iterator[None]:
    """Puts back which parameters are trained: a forward of X-LoRA's, until PEFT 0.18, switches others on."""
    before = [(each, each.requires_grad) for each in model.parameters() if each.is_leaf]
    try:
        yield
    finally:
        for parameter, trained in before:
            parameter.requires_grad_(trained)


@contextmanager
def _kind_put_back(model: nn.Module) -> Iterator[None]:
    """Puts back of which modules a model consists, and raises PadfreeError, if a run has changed what it says it is.

    BigBird turns its sparse attention into a full one in its first call that is too short for the sparse one.
    """
    models = pretrained_modules(model)
    said = [(each, name, word) for each in models for name, word in _words(each).items()]
    before = [(each, _words(each), dict(each._modules)) for each in model.modules()]
    changed: list[tuple[nn.Module, str, str, object]] = []
    try:
        yield
    finally:
        changed += [(*each, now) for each in said if (now := vars(each[0]).get(each[1])) != each[2]]
        for each, words, modules in before if changed else ():
            vars(each).update(words)
            each._modules.clear()
            each._modules.update(modules)
    if changed:
        module, name, word, now = changed[0]
        raise PadfreeError(
            f"a short call makes {type(module).__name__} another model, for good: its {name} went from {word!r} to "
            f"{now!r}. What an example gives would depend on those before it; make the model with {name}={now!r} in "
            "its config, or train it on padded batches"
        )


def _words(module: nn.Module) -> dict[str, str]:
    """Returns what a module says of itself in words."""
    return {name: value for name, value in vars(module).items() if isinstance(value, str)}


@contextmanager
def _modes_put_back(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


@contextmanager
def _unchecked(model: nn.Module) -> Iterator[None]:
    """Lets the calls of a check pass without another check."""
    opt_ins = list(OptIn.all_in(model).values())
    before = [opt_in.being_checked for opt_in in opt_ins]
    for opt_in in opt_ins:
        opt_in.being_checked = True
    try:
        yield
    finally:
        for opt_in, was in zip(opt_ins, before):
            opt_in.being_checked = was


@contextmanager
def _buffers_put_back(model: nn.Module) -> Iterator[None]:
    """Puts back, of every module that has buffers, its attributes, which buffers it has, and their values."""
    attributes = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules() if module._buffers]
    values = [(buffer, buffer.clone()) for _, _, own in attributes for buffer in own.values() if buffer is not None]
    try:
        yield
    finally:
        for module, own, buffers in attributes:
            vars(module).clear()
            vars(module).update(own)
            module._buffers.clear()
            module._buffers.update(buffers)
        for buffer, value in values:
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


@contextmanager
def states_put_back(model: nn.Module) -> Iterator[None]:
    """Takes from modules what a call left at them for the next one to go on with, such as a recurrence's state."""
    before = [(m, set(vars(m)), _plain_values(m), dict(m._buffers)) for m in model.modules()]
    try:
        yield
    finally:
        for module, names, values, buffers in before:
            for new in _plain_values(module).keys() - names:
                delattr(module, new)
            vars(module).update(values)
            if buffers or module._buffers:  # a table that has grown is another buffer
                module._buffers.clear()
                module._buffers.update(buffers)


def _plain_values(module: nn.Module) -> dict[str, object]:
    """Returns what a call may leave: tensors, and numbers that say how much they hold, as of Falcon's old rotary."""
    kinds = (type(None), Tensor, bool, int, float)
    return {name: value for name, value in vars(module).items() if isinstance(value, kinds)}
