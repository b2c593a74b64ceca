"""Reads texts from a JSON-lines file and turns them into token ids."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..arguments import whole_number
from ..errors import PadfreeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

Item = TypeVar("Item")

FIELDS = ("prompt", "completion")

CHARACTERS_PER_TOKEN = 32
"""So many characters of a text are read for each token that is wanted, and more if they give too few tokens."""

SPARE_TOKENS = 32
"""Where the beginning of a text ends, its last tokens may be others than in the whole text; so many are left out."""


class DataError(PadfreeError):
    """A data file that cannot be trained on; the message says where and why."""


def read_texts(path: Path, fields: Sequence[str] = FIELDS) -> list[str]:
    """Reads one text per line of a .jsonl or .jsonl.gz file: its fields joined, prompt and completion by default.

    Raises DataError naming the first line that is not such an object, and what it holds instead.
    """
    path = Path(path)
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
            texts = [
                read_text(line, f"{path}, line {number}", fields)
                for number, line in enumerate(lines, 1)
                if line.strip()
            ]
    except PadfreeError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:  # not there, no name, not gzip, cut off, or not text
        raise DataError(f"{str(path)!r} cannot be read as JSON lines, plain or .gz: {error}") from error
    if not texts:
        raise DataError(f"{path} has no examples: expected one JSON object with {' and '.join(fields)} per line")
    return texts


def read_text(line: str, place: str, fields: Sequence[str] = FIELDS) -> str:
    """Joins the fields of a line, with a line break between two if the first does not end in white space.

    Raises DataError naming the `place` if the line is no object with these fields, or all are empty.
    """
    wanted = " and ".join(fields)
    try:
        example = json.loads(line)
    except (ValueError, RecursionError) as error:  # no JSON, a number of thousands of digits, thousands of brackets
        raise DataError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(example, dict):
        raise DataError(f"{place}: expected an object with {wanted}, found {type(example).__name__}")
    text = ""
    for field in fields:
        value = example.get(field)
        if not isinstance(value, str):
            known = (
                f"a value of type {type(value).__name__}" if field in example else f"only the keys {sorted(example)}"
            )
            raise DataError(f"{place}: expected a string in field {field!r}, found {known}")
        text += ("\n" if text and not text[-1].isspace() else "") + value
    if not text:
        raise DataError(f"{place}: {wanted} {'are both' if len(fields) == 2 else 'is all'} empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a character
        raise DataError(f"{place}: no text: {text[error.start]!a} is half of a character") from error
    return text


def shuffled(items: list[Item], *, count: int, seed: int) -> list[Item]:
    """Returns `count` items in random order; each is used once before any is used twice.

    Raises PadfreeError if there are no items.
    """
    if not items:
        raise PadfreeError("no items to draw from")

    def epochs() -> Iterator[Item]:
        generator = random.Random(seed)
        while True:
            yield from generator.sample(items, len(items))

    return list(itertools.islice(epochs(), whole_number(count, "count", 0)))


def tokenise(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> list[list[int]]:
    """Returns the token ids of each text with the end-of-text token, if there is one, cut to `max_length` tokens.

    Of a text that is far longer, only the beginning is read.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    characters = CHARACTERS_PER_TOKEN * whole_number(max_length, "max_length", 1)
    beginnings = [_beginning(text, characters) for text in texts]
    ids = tokenizer(beginnings, verbose=False)[
        "input_ids"
    ]  # verbose: no warning about lengths that are cut here anyway
    for i, text in enumerate(texts):
        while len(ids[i]) < max_length + SPARE_TOKENS and len(beginnings[i]) < len(text):
            beginnings[i] = _beginning(text, 4 * len(beginnings[i]))
            ids[i] = tokenizer(beginnings[i], verbose=False)["input_ids"]
    return [(text_ids + end)[:max_length] for text_ids in ids]


def _beginning(text: str, characters: int) -> str:
    """Returns so many characters of a text, up to the end of a word if there is one among the last hundred."""
    if len(text) <= characters:
        return text
    words = text[:characters].rpartition(" ")[0]
    return words if len(words) > max(characters - 100, characters // 2) else text[:characters]


def train_tokenizer(texts: list[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on the texts themselves, on the first 2**17 characters of each."""
    import tokenizers
    import transformers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text[: 2**17] for text in texts), trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
