"""Models and trainings that come through the door."""

from __future__ import annotations

from transformers import AutoModelForCausalLM

from padfree_patch.registry import registry
from padfree_patch.testing import tiny_model


def tiny_config(**changed):
    """The config of a tiny Llama."""
    config = tiny_model(registry().get("llama"), "sdpa").config
    for name, value in changed.items():
        setattr(config, name, value)
    return config


def made():
    """A tiny Llama, made as tools make theirs."""
    return AutoModelForCausalLM.from_config(tiny_config(), attn_implementation="sdpa")


def lines(capfd):
    """What the door has said since the last time."""
    return [line for line in capfd.readouterr().err.splitlines(keepends=True) if line.startswith("padfree-patch")]
