"""Reads texts from a JSON-lines file and turns them into token ids."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..errors import PadfreeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

Item = TypeVar("Item")

FIELDS = ("prompt", "completion")


class DataError(PadfreeError):
    """A data file that cannot be trained on; the message says where and why."""


def read_texts(path: Path, fields: Sequence[str] = FIELDS) -> list[str]:
    """Reads one text per line of a .jsonl or .jsonl.gz file: its fields joined, prompt and completion by default.

    Raises DataError naming the first line that is not such an object, and what it holds instead.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
            texts = [
                read_text(line, f"{path}, line {number}", fields)
                for number, line in enumerate(lines, 1)
                if line.strip()
            ]
    except (OSError, EOFError, UnicodeDecodeError) as error:  # not there, not gzip, cut off, or not text
        raise DataError(f"{path}: cannot be read as JSON lines, plain or .gz: {error}") from error
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
    except json.JSONDecodeError as error:
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
    return text


def shuffled(items: list[Item], *, count: int, seed: int) -> list[Item]:
    """Returns `count` items in random order; each is used once before any is used twice."""

    def epochs() -> Iterator[Item]:
        generator = random.Random(seed)
        while True:
            yield from generator.sample(items, len(items))

    return list(itertools.islice(epochs(), count))


def tokenise(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> list[list[int]]:
    """Returns the token ids of each text with the end-of-text token, if there is one, cut to `max_length` tokens."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = tokenizer(texts, verbose=False)["input_ids"]  # verbose: no warning about lengths that are cut here anyway
    return [(text_ids + end)[:max_length] for text_ids in ids]


def train_tokenizer(texts: list[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on the texts themselves."""
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
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
