"""apply where no patch says all: ways are found in the live model, and `verify` decides."""

from __future__ import annotations

from torch import nn

from .. import verification
from ..any_decoder.decoder import check_decoder, check_reads_one_text
from ..any_decoder.way import Way, ways_of
from ..any_decoder.whole_row import note_device, with_kernels
from ..errors import PadfreeError
from ..models import pretrained_modules
from ..registry import registry
from ..verification.untouched import unwrapped
from ..wrapping.opt_in import OptIn
from .checking import Check, check
from .plan import opt_in, plan_way
from .state import State

MOST_NAMED = 5
"""Classes that verify may name before a way is given up."""


def apply_found(model: nn.Module, before: State, backend: str, *, verify: bool) -> Check | str:
    """Patches a model in the first way that `verify` passes. Returns the check, or why there was none.

    Takes off first how it was patched before.

    Raises PadfreeError, with what each way came to, if none passes.
    """
    before.take_off()  # what is patched already would answer for a way that lacks it
    check_decoder(model)
    clean, failures = State(model), []
    unchecked = _why_not_to_check(model, verify=verify)
    for way in ways_of(model) if unchecked else with_kernels(ways_of(model)):
        for _ in range(MOST_NAMED + 1):
            opt_in(plan_way(model, way), {}, backend)
            _describe(model, way)
            if unchecked:
                _keep(model, way)
                return unchecked
            result = _measured(model, way)
            if isinstance(result, Check) and result.result.ok:
                _keep(model, way)
                return result
            failures.append(f"{way}:\n{result}")
            named = _named_class(model, result)
            clean.put_back()
            if named is None or named in way.named:
                break
            way = way.with_named(named)
    raise PadfreeError(
        f"{type(pretrained_modules(model)[0]).__name__}: no way was found that keeps its examples "
        f"apart; it was put back as it was{_registered_inside(model)}. Tried:\n" + "\n".join(failures)
    )


def enter_first_way(model: nn.Module, before: State, backend: str) -> None:
    """Patches a model in the first way that would be tried, and runs nothing: whoever calls this verifies it later.

    Raises PadfreeError if no way can be right: the model reads two texts, or nothing in it can be entered.
    """
    before.take_off()
    check_reads_one_text(model)
    way = ways_of(model)[0]
    if not (way.models and (way.fast or way.split)):
        name = type(pretrained_modules(model)[0]).__name__
        raise PadfreeError(f"{name}: nothing in it takes tokens and a mask")
    opt_in(plan_way(model, way), {}, backend)
    _describe(model, way)
    for mine in OptIn.all_in(model).values():
        mine.trying = False


def _registered_inside(model: nn.Module) -> str:
    """Says which model with a registered patch is inside, as the language model of one that sees: for the error."""
    for name, module in model.named_modules():
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        if name and module in pretrained_modules(model) and registry().get(model_type) is not None:
            return f"; padfree_patch.apply(model.{name}) patches the {type(module).__name__} in it alone"
    return ""


def _why_not_to_check(model: nn.Module, *, verify: bool) -> str | None:
    if not verify:
        return "verify=False was passed, and only a check says in which way this architecture is right"
    return verification.why_it_cannot_run(model)


def _measured(model: nn.Module, way: Way) -> Check | str:
    """Returns what verify measures, or the error of a packed row that does not run.

    Mixers whose kernels are told where sequences begin may call others in training (Mamba 2): both modes are tried.
    """
    told = [each for each in model.modules() if type(each) in way.whole]
    try:
        found = check(model)
        return check(model, training=told) if told and found.result.ok else found
    except Exception as error:
        return f"  a packed row fails: {type(error).__name__}: {error}"


def _named_class(model: nn.Module, checked: Check | str) -> type | None:
    """Returns the class of the first module that leaks, or gives an example something else than alone."""
    if isinstance(checked, str) or not (name := checked.result.first_leak or checked.result.first_difference):
        return None
    cls = type(unwrapped(model).get_submodule(name))
    return None if cls.__module__.startswith(("torch.nn", "peft.")) and cls is not nn.ZeroPad2d else cls


def _describe(model: nn.Module, way: Way) -> None:
    inside = sorted({type(each).__name__ for each in _inside_layers(model) if type(each) in way.named})
    for mine in OptIn.all_in(model).values():
        mine.way, mine.layers, mine.not_recomputed = str(way), 0, tuple(inside)
        mine.trying = True


def _inside_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the modules that lie in a list of layers, which gradient checkpointing runs again."""
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList)]
    return [inner for each in lists for inner in each.modules()]


def _keep(model: nn.Module, way: Way) -> None:
    """Notes how many modules answered: a later packed call that fewer answer is an error."""
    reads = verification.reads_first_label(model)
    for mine in OptIn.all_in(model).values():
        mine.way, mine.layers = str(way), mine.answered  # what was special about attention shows only now
        mine.trying, mine.reads_first_label = False, reads
    note_device(model.modules(), way)
