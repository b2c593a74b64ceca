"""The command that looks at data: estimate."""

from __future__ import annotations

from pathlib import Path

import click

from ..foreign import explained
from .loading import load_tokenizer
from .output import json_option, print_result


@click.command()
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
@click.option("--field", "fields", multiple=True, help="Text fields to join.  [default: prompt, completion]")
@json_option
def estimate(
    data: Path, tokenizer: str, batch_size: int, max_length: int, fields: tuple[str, ...], as_json: bool
) -> None:
    """Say what padding costs on your own data; loads no model."""
    loaded = load_tokenizer(tokenizer)
    from ..measure.estimation import estimate
    from ..measure.texts import FIELDS, read_texts, tokenise

    texts = read_texts(data, fields or FIELDS)
    with explained(f"the tokenizer in {tokenizer!r} fails on the texts of {data}"):
        lengths = [len(ids) for ids in tokenise(texts, loaded, max_length=max_length)]
    print_result(estimate(lengths, batch_size=batch_size), as_json)
