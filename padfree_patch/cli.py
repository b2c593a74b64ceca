"""The command line: padfree-patch explain | verify | bench | estimate | demo | list. Each takes --json."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

try:
    import click
except ImportError as error:  # an extra: training machines need not have it
    raise SystemExit("padfree-patch needs click: pip install 'padfree_patch[cli]'") from error

from . import patching, versions
from .errors import PadfreeError
from .foreign import explained
from .measure.texts import FIELDS, read_texts, tokenise
from .patching import support
from .registry import registry


class Result(Protocol):
    """What a command found: `str()` reads well, `as_dict()` is for machines."""

    def as_dict(self) -> Mapping[str, object]: ...


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="padfree_patch")
def cli() -> None:
    """Look at a model, check it, try it: padding-free training that is exact."""


def _model_options(command: Callable[..., None]) -> Callable[..., None]:
    for decorate in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option("--attn", default="sdpa", show_default=True, help="Attention implementation to load it with."),
        click.option("--tiny", is_flag=True, help="MODEL is a model type; build a tiny random one."),
        click.argument("model"),
    ):
        command = decorate(command)
    return command


@cli.command()
@_model_options
def explain(model: str, tiny: bool, attn: str, as_json: bool) -> None:
    """Say what upstream does with a packed row on MODEL (a directory or name), and what apply would do."""
    from . import explain as explain_model

    explanation = explain_model(_load(model, tiny, attn))
    _print(explanation, as_json)
    sys.exit(1 if explanation.refused else 0)


@cli.command()
@click.option("--unpatched", is_flag=True, help="Check upstream alone, without apply.")
@_model_options
def verify(model: str, tiny: bool, attn: str, as_json: bool, unpatched: bool) -> None:
    """Apply to MODEL (a directory or name) and prove that the examples of a packed row do not mix."""
    from . import apply
    from . import verify as verify_model

    loaded = _load(model, tiny, attn)
    result = verify_model(loaded if unpatched else apply(loaded, verify=False))
    _print(result, as_json)
    sys.exit(0 if result.ok else 1)


@cli.command()
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(min=1), help="Examples per step.")
@click.option("--steps", default=5, show_default=True, type=click.IntRange(min=1), help="Timed steps of each kind.")
@_model_options
def bench(model: str, tiny: bool, attn: str, as_json: bool, batch_size: int, steps: int) -> None:
    """Time a training step on MODEL: padded, padding-free, and as many tokens in rows of one length."""
    from .measure.step import bench_step

    result = bench_step(_load(model, tiny, attn), batch_size=batch_size, steps=steps)
    _print(result, as_json)


@cli.command()
@click.option("--data", required=True, type=Path, help="JSON lines, plain or .gz.")
@click.option("--tokenizer", required=True, help="Folder or name of the tokenizer.")
@click.option("--batch-size", required=True, type=click.IntRange(min=1), help="Examples per batch.")
@click.option(
    "--max-length",
    default=2048,
    show_default=True,
    type=click.IntRange(min=1),
    help="Tokens that longer examples are cut to.",
)
@click.option("--field", "fields", multiple=True, default=FIELDS, show_default=True, help="Text fields to join.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def estimate(
    data: Path, tokenizer: str, batch_size: int, max_length: int, fields: tuple[str, ...], as_json: bool
) -> None:
    """Estimate what padding costs on your own data, and what leaving it out would save; loads no model."""
    from transformers import AutoTokenizer

    from .measure.estimation import estimate as estimate_lengths

    texts = read_texts(data, fields)
    with explained(f"no tokenizer can be loaded from {tokenizer!r}"):
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    with explained(f"the tokenizer in {tokenizer!r} fails on the texts of {data}"):
        lengths = [len(ids) for ids in tokenise(texts, loaded, max_length=max_length)]
    _print(estimate_lengths(lengths, batch_size=batch_size), as_json)


@cli.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_patches(as_json: bool) -> None:
    """List the architectures with a patch, and the transformers versions that each was tested on."""
    version = str(versions.transformers_version())
    rows = [
        {
            "model_type": patch.model_type,
            "tested": patch.transformers,
            **{name: support.status(version, patch.model_type, name) for name in patching.IMPLEMENTATIONS},
        }
        for patch in registry().patches()
    ]
    if as_json:
        click.echo(json.dumps({"transformers": version, "patches": rows}))
        return
    click.echo(f"{'':12} {'transformers':14} on {version}: {', '.join(patching.IMPLEMENTATIONS)}")
    for row in rows:
        words = ", ".join(row[name] for name in patching.IMPLEMENTATIONS)
        click.echo(f"{row['model_type']:12} {row['tested']:14} {words}")


def _load(model: str, tiny: bool, attn: str) -> Any:
    if tiny:
        from .testing import tiny_model

        patch = registry().get(model)
        if patch is None:
            raise PadfreeError(f"no patch for {model!r}; there are {', '.join(registry().model_types())}")
        with explained(f"no tiny {model} can be made for --attn {attn}"):
            return tiny_model(patch, attn)
    from transformers import AutoModelForCausalLM

    with explained(f"no causal language model can be loaded from {model!r} for --attn {attn}"):
        return AutoModelForCausalLM.from_pretrained(model, attn_implementation=attn)


def _print(result: Result, as_json: bool) -> None:
    if not as_json:
        click.echo(str(result))
        return
    # What was not measured is NaN, which JSON does not have.
    text = json.dumps(result.as_dict())
    click.echo(json.dumps(json.loads(text, parse_constant=lambda _: None)))


def main() -> None:
    """Runs the command line: errors of ours are a line and exit status 2, others keep their traceback."""
    from .demo.command import demo

    cli.add_command(demo)
    try:
        cli()
    except PadfreeError as error:
        click.echo(f"padfree-patch: {error}", err=True)
        sys.exit(2)
