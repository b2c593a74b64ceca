"""The command that draws: which token of a packed row sees which, or the rows of a real batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import PadfreeError
from ..foreign import explained
from ..pictures.figure import check_matplotlib
from .loading import load, load_tokenizer
from .output import json_option, print_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

    from ..verification import Sight


@click.command()
@click.argument("model", required=False)
@click.option("--tiny", is_flag=True, help="MODEL is a model type; build a tiny random one.")
@click.option("--attn", help="Attention implementation to load it with.  [default: what transformers chooses]")
@click.option("--data", type=Path, help="JSON lines, plain or .gz: draw a batch of them instead of a model.")
@click.option("--tokenizer", help="With --data: folder or name.  [default: one that is trained on the file]")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1, 64), help="Examples in the batch.")
@click.option("--max-length", default=2048, show_default=True, type=click.IntRange(1), help="Tokens of an example.")
@click.option("--field", "fields", multiple=True, help="Text fields to join.  [default: prompt, completion]")
@click.option("--out", type=Path, help="Picture to write, also a .svg or .pdf.  [default: packed-row.png]")
@json_option
def show(
    model: str | None,
    tiny: bool,
    attn: str | None,
    data: Path | None,
    tokenizer: str | None,
    batch_size: int,
    max_length: int,
    fields: tuple[str, ...],
    out: Path | None,
    as_json: bool,
) -> None:
    """Draw a packed row: which token sees which.

    MODEL is a folder or a name on the hub: its packed row is measured before and after apply. With --data FILE, draw a
    batch of your texts instead, padded and packed. Prints the picture in letters, and writes it to --out if matplotlib
    is installed.
    """
    if (model is None) == (data is None):
        raise click.UsageError("give a MODEL, or --data FILE")
    if data is not None:
        from ..pictures.batch import BatchPicture

        lengths, source = _drawn_lengths(data, tokenizer, fields, batch_size, max_length)
        batch = BatchPicture(lengths, source)
        _print(str(batch), batch.as_dict(), as_json)
        _write(batch.plot, out, as_json)
        return
    from ..pictures.packed_row import draw

    loaded = load(str(model), tiny, attn)
    title, panels = _looked_at(loaded)
    text = "\n\n".join([title, *(f"{caption}\n{_indented(sight)}" for caption, sight in panels.items()), _LETTERS])
    found = {caption: {"isolated": bool(sight), "rows": sight.rows} for caption, sight in panels.items()}
    _print(text, {"title": title, "panels": found}, as_json)
    _write(lambda: draw(panels, title=title), out, as_json)


_LETTERS = "A row is a token, x is one that it sees, ! one of another example that it sees."


def _looked_at(model: PreTrainedModel) -> tuple[str, dict[str, Sight]]:
    """Measures a model as it is, in the two ways of calling that upstream serves differently, and patched."""
    from .. import versions
    from ..models import implementation_of
    from ..patching import apply
    from ..verification import look

    version = versions.transformers_version()
    title = f"{type(model).__name__} ({implementation_of(model.config)}), transformers {version}"
    bare, as_trainer = look(model), look(model, use_cache=False)
    panels = {"upstream alone": bare}
    if as_trainer != bare:
        panels = {"upstream alone: model(**batch)": bare, "upstream alone: use_cache=False": as_trainer}
    apply(model)
    return title, {**panels, "patched": look(model)}


def _drawn_lengths(
    data: Path, tokenizer: str | None, fields: tuple[str, ...], batch_size: int, max_length: int
) -> tuple[tuple[int, ...], str]:
    """Draws a batch of texts at random; returns their tokens, and in words where they come from."""
    from ..measure.texts import FIELDS, read_texts, tokenise, train_tokenizer

    texts = read_texts(data, fields or FIELDS)
    if len(texts) < batch_size:
        raise PadfreeError(f"{data} has {len(texts)} texts, too few for a batch of {batch_size}; give a --batch-size")
    chosen = random.Random(0).sample(texts, batch_size)
    if tokenizer is None:
        counted = "a tokenizer trained on the file"
        loaded = train_tokenizer(texts[:2000], vocab_size=8192)
    else:
        counted, loaded = tokenizer, load_tokenizer(tokenizer)
    with explained(f"the tokenizer in {tokenizer!r} fails on the texts of {data}"):
        lengths = tuple(len(ids) for ids in tokenise(chosen, loaded, max_length=max_length))
    return lengths, f"{batch_size} of {len(texts):,} texts of {data.name}, tokens of {counted}"


def _indented(sight: Sight) -> str:
    return "\n".join(f"  {' '.join(line)}" for line in str(sight).splitlines())


def _print(text: str, found: Mapping[str, object], as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        click.echo(text)


def _write(plot: Callable[[], Figure], out: Path | None, as_json: bool) -> None:
    """Writes the picture; without matplotlib that is an error only if a file was asked for: the letters are printed."""
    try:
        check_matplotlib()
    except PadfreeError as error:
        if out is not None:
            raise
        click.echo(f"padfree-patch: no file was written: {error}", err=True)
        return
    path = out or Path("packed-row.png")
    with explained(f"no picture can be written to {str(path)!r}"):
        plot().savefig(path, dpi=150)
    click.echo(f"wrote {path}", err=as_json)
