"""Texts: what cannot be read or tokenised is an error that says where; of long ones only the beginning is read."""

from __future__ import annotations

import gzip
import json

import pytest

from padfree_patch import PadfreeError
from padfree_patch.measure.texts import read_texts, shuffled, tokenise, train_tokenizer

LINES = "\n".join(json.dumps({"prompt": "one two", "completion": f"three {i}"}) for i in range(50))


def compressed():
    """Returns the same bytes in every process."""
    return gzip.compress(LINES.encode(), mtime=0)


def damaged():
    packed = bytearray(compressed())
    packed[len(packed) // 2] ^= 0xFF
    return bytes(packed)


UNREADABLE = {
    "cut.jsonl.gz": (compressed()[:-20], "cut.jsonl.gz' cannot be read as JSON lines"),
    "bad.jsonl.gz": (damaged(), "bad.jsonl.gz' cannot be read as JSON lines"),
    "bytes.jsonl": (b"\xff\xfe\xfa", "bytes.jsonl' cannot be read as JSON lines"),
    "deep.jsonl": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1: not valid JSON: maximum"),
    "digits.jsonl": (b'{"prompt": ' + b"1" * 5000 + b"}", "line 1: not valid JSON: Exceeds the limit"),
    "half.jsonl": (rb'{"prompt": "a\ud800", "completion": "b"}', r"line 1: no text: '\\ud800' is half of a char"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path, name):
    content, message = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PadfreeError, match=message):
        read_texts(tmp_path / name)


def test_a_path_that_is_none_is_an_error():
    with pytest.raises(PadfreeError, match="embedded null byte"):
        read_texts("a\0b")


def test_of_a_long_text_only_the_beginning_is_tokenised():
    """Its first tokens are those of the whole text, whether it has spaces or not."""
    tokenizer = train_tokenizer(["one two three four five"] * 3, vocab_size=300)
    texts = ["one two three " * 4000, "onetwothree" * 4000, " " * 9000 + "one" * 9000, "short", "five four " * 4000]
    whole = [ids[:50] for ids in tokenizer([f"{text}" for text in texts])["input_ids"]]
    lengths = []

    def counted(given, **options):
        lengths.append(sum(map(len, [given] if isinstance(given, str) else given)))
        return tokenizer(given, **options)

    counted.eos_token_id = None
    assert tokenise(texts, counted, max_length=50) == whole
    assert sum(lengths) < 0.1 * sum(map(len, texts))


def test_nothing_is_drawn_from_nothing():
    with pytest.raises(PadfreeError, match="no items to draw from"):
        shuffled([], count=1, seed=0)
