"""Rows whose examples share prompts: what a model does that would make them another training is refused by name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..batch.packed_batch import PackedBatch
from ..batch.sequences import PackedSequences
from ..batch.shared_row import SharedRow
from ..errors import PadfreeError
from ..registry import registry
from ..upstream import Arguments
from ..wrapping.call import Call
from ..wrapping.opt_in import OptIn
from .rotary import depends_on_length

_RANDOM = ("drop", "jitter")
"""In the names by which configs call the chance, or the size, of something random in training."""

_OF_OTHER_HEADS = ("classifier", "summary")
"""In the names of what has nothing to do with text that goes on."""

_DRAWN_ONCE = "would be drawn once for a prompt, not once for each example; set it to 0"


def take_tokens(arguments: Arguments) -> None:
    """Puts token ids that can be embedded in the place of those of a row with shared prompts.

    Raises PadfreeError if nothing among the arguments says which examples share what.
    """
    ids = arguments.get("input_ids")
    if not isinstance(ids, SharedRow):
        return
    packed = arguments.get("packed_sequences")
    if not isinstance(packed, PackedSequences) or packed.prefixes is None:
        raise PadfreeError(
            "the examples of this row share prompts, but the call has no packed_sequences with prefixes, which say "
            "where they end; pass everything that the collator made, except labels if the loss is your own"
        )
    arguments["input_ids"] = ids.plain()


def check_can_share(call: Call, batch: PackedBatch) -> None:
    """Raises PadfreeError, with the reason, if a model can't give examples that share prompts what each gets alone."""
    if batch.sequences.prefixes is None:
        return
    module = call.module
    for reason in _reasons(module, call.arguments):
        raise PadfreeError(
            f"{type(module).__name__}: the examples of this row share prompts, but {reason}. Collate without "
            "share_prompts and share_prefixes"
        )


def _reasons(module: nn.Module, arguments: Arguments) -> Iterator[str]:
    """Yields what stands against shared prompts in a call of a model."""
    config, opt_in = getattr(module, "config", None), OptIn.of(module)
    asked = arguments.get("output_router_logits")
    if getattr(config, "output_router_logits", False) if asked is None else asked:
        yield "the router loss (output_router_logits) would count a prompt once, not once for each example"
    for name, each in module.named_modules():
        if depends_on_length(each):
            yield f"{type(each).__name__} ({name}) rotates the tokens of a prompt by the length of each example"
        if module.training and isinstance(each, nn.modules.dropout._DropoutNd) and each.training and each.p > 0:
            yield f"dropout ({name}, p={each.p}) {_DRAWN_ONCE}"
    for name, value in _random_of(config) if module.training else ():
        yield f"{name}={value} of its config {_DRAWN_ONCE}"
    patch = registry().get(opt_in.model_type) if opt_in is not None and not opt_in.way else None
    if patch is not None and patch.attention_call is not None and not patch.attention_call_knows_prompts:
        yield f"the attention_call of the patch for {patch.model_type!r} does not say that it knows such rows"


def _random_of(config: object) -> Iterator[tuple[str, float]]:
    """Yields what a config says is random in training, by name, also in configs inside it."""
    for name, value in vars(config).items() if config is not None else ():
        if hasattr(value, "to_dict"):
            yield from _random_of(value)
        elif type(value) in (int, float) and value > 0 and _is_random(name):
            yield name, value


def _is_random(name: str) -> bool:
    return any(part in name for part in _RANDOM) and not any(part in name for part in _OF_OTHER_HEADS)
