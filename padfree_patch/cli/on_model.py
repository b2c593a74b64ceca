"""The commands that look at a model: explain, verify, bench."""

from __future__ import annotations

import sys
from collections.abc import Callable

import click

from ..errors import PadfreeError
from .loading import load
from .output import json_option, print_result


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options --tiny, --attn and --json, and the argument MODEL."""
    for decorate in (
        json_option,
        click.option("--attn", help="Attention implementation to load it with.  [default: what transformers chooses]"),
        click.option("--tiny", is_flag=True, help="MODEL is a model type; build a tiny random one."),
        click.argument("model"),
    ):
        command = decorate(command)
    return command


@click.command()
@click.option("--verbose", is_flag=True, help="Show also notes, backends, windows and what apply wraps.")
@model_options
def explain(model: str, tiny: bool, attn: str | None, as_json: bool, verbose: bool) -> None:
    """Say what upstream does with packed rows, and what apply changes.

    MODEL is a folder or a name on the hub. Exit code 1 if apply refuses it.
    """
    loaded = load(model, tiny, attn)
    from ..patching.explanation import explain

    explanation = explain(loaded, verbose=verbose)
    print_result(explanation, as_json)
    sys.exit(1 if explanation.refused else 0)


@click.command()
@click.option("--unpatched", is_flag=True, help="Check upstream alone, without apply.")
@model_options
def verify(model: str, tiny: bool, attn: str | None, as_json: bool, unpatched: bool) -> None:
    """Prove on your model that packed examples do not mix.

    MODEL is a folder or a name on the hub; apply patches it first. Exit code 1 if its examples mix.
    """
    loaded = load(model, tiny, attn)
    from ..patching import apply
    from ..registry import found_by_check, patch_for
    from ..verification import verify

    if not unpatched:
        apply(loaded, verify=found_by_check(patch_for(loaded)))
    result = verify(loaded)
    print_result(result, as_json)
    sys.exit(0 if result.ok else 1)


@click.command()
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(min=1), help="Examples per step.")
@click.option("--steps", default=5, show_default=True, type=click.IntRange(min=1), help="Timed steps of each kind.")
@model_options
def bench(model: str, tiny: bool, attn: str | None, as_json: bool, batch_size: int, steps: int) -> None:
    """Time a training step: padded, padding-free, and the ceiling.

    MODEL is a folder or a name on the hub. The ceiling is as many tokens in rows of one length.
    """
    loaded = load(model, tiny, attn)
    from ..measure.step import bench_step

    if loaded.get_output_embeddings() is None:
        raise PadfreeError(
            f"bench trains a language model, and {type(loaded).__name__} in {model!r} has no head for it"
        )
    print_result(bench_step(loaded, batch_size=batch_size, steps=steps), as_json)
