"""What the labels of a head are about: the token after each, the token itself, or something else than tokens."""

from __future__ import annotations

from torch import nn

from ..wrapping.opt_in import OptIn

_NAMES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def is_language_head(module: nn.Module) -> bool:
    """Whether a module is a model around a decoder that predicts tokens."""
    return any(base.__name__.endswith(_NAMES) for base in type(module).__mro__)


def reads_first_label(head: nn.Module) -> bool:
    """Whether a head's loss takes labels as they are, not as what follows each token; BART's kin as decoders do."""
    opt_in = OptIn.of(head)
    return opt_in is not None and opt_in.reads_first_label


def predicts_next_tokens(head: nn.Module) -> bool:
    """Whether a head's labels say what follows each token; those of a token classifier are about the token itself."""
    return is_language_head(head) and not reads_first_label(head)
