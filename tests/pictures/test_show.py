"""`padfree-patch show`: pictures in letters and as a file, of a model and of a batch."""

from __future__ import annotations

import json
import sys

import pytest
from click.testing import CliRunner
from matplotlib.image import imread

from padfree_patch import PadfreeError, versions
from padfree_patch.cli import cli
from padfree_patch.demo.compare import SAMPLE
from padfree_patch.measure.texts import train_tokenizer
from padfree_patch.pictures.batch import BatchPicture


def show(*arguments):
    return CliRunner().invoke(cli, ["show", *map(str, arguments)])


def test_a_model_is_shown_before_and_after(tmp_path):
    result = show("llama", "--tiny", "--out", tmp_path / "row.png")
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM" in result.output and "! ! ! ! ! ! ! ! ! x" in result.output
    assert result.output.partition("patched")[2].count("!") == 1  # the legend's
    assert imread(tmp_path / "row.png").shape[1] > 1000
    (tmp_path / "row.svg").write_text("")
    found = json.loads(show("llama", "--tiny", "--json", "--out", tmp_path / "row.svg").stdout)
    panels = found["panels"]
    assert list(panels)[-1] == "patched" and panels["patched"]["isolated"]
    # From 4.53 on upstream isolates a call without a cache, and the picture says so.
    assert [each["isolated"] for each in panels.values()] == [False, *[True] * (1 + versions.transformers(">=4.53"))]
    assert "<svg" in (tmp_path / "row.svg").read_text()


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = ({"prompt": "one two", "completion": "three " * (1 + 7 * i)} for i in range(6))
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_batch_is_shown_padded_and_packed(data, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    train_tokenizer(["one two three"], vocab_size=300).save_pretrained(tokenizer)
    arguments = ("--data", data, "--tokenizer", tokenizer, "--batch-size", 4, "--out", tmp_path / "batch.png")
    text, found = show(*arguments).output, json.loads(show(*arguments, "--json").stdout)
    assert f"padded: 4 x {max(found['lengths'])} tokens, {found['padding_share']:.0%} padding" in text
    assert f"packed: 1 x {sum(found['lengths'])} tokens" in text
    assert f"4 of 6 texts of data.jsonl, tokens of {tokenizer}" in text
    assert imread(tmp_path / "batch.png").shape[1] > 1000


def test_without_a_tokenizer_one_is_trained_and_named(data, tmp_path):
    assert (
        "tokens of a tokenizer trained on the file"
        in show("--data", data, "--batch-size", 4, "--out", tmp_path / "x.png").output
    )


def test_the_bundled_texts_are_shown(tmp_path):
    assert "padding" in show("--data", SAMPLE, "--out", tmp_path / "x.png").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a MODEL, or --data FILE"),
        (("llama", "--data", "x.jsonl"), "give a MODEL, or --data FILE"),
        (("--data", "nothing.jsonl"), "cannot be read as JSON lines"),
        (("--data", "{data}", "--batch-size", "7"), "has 6 texts, too few for a batch of 7"),
        (("llama", "--tiny", "--out", "/nothing/row.png"), "no picture can be written to '/nothing/row.png'"),
        (("llama", "--tiny", "--out", "row.nothing"), "no picture can be written to 'row.nothing'"),
    ],
)
def test_what_cannot_be_shown_is_said(data, arguments, message):
    result = show(*(each.format(data=data) for each in arguments))
    assert result.exit_code and message in f"{result.output}{result.exception}"
    assert isinstance(result.exception, SystemExit | PadfreeError)


def test_without_matplotlib_the_letters_are_printed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = show("llama", "--tiny")
    assert result.exit_code == 0 and "! x" in result.output
    assert "no file was written: pictures need matplotlib: pip install 'padfree_patch[pictures]'" in result.output
    assert not list(tmp_path.iterdir())
    asked = show("llama", "--tiny", "--out", "row.png")
    assert isinstance(asked.exception, PadfreeError)


def test_letters_count_what_they_show():
    batch = BatchPicture((1, 3, 4))
    assert (batch.real, batch.padded, batch.padding_share) == (8, 12, 1 - 8 / 12)
    text = str(batch).splitlines()
    assert [line.count("#") for line in text[1:4]] == [16, 48, 64]  # of 64 columns for the longest
    assert text[5].count("|") == 2 and len(text[5].strip()) == 10


def test_bars_are_as_long_as_the_examples():
    above, below = BatchPicture((1, 3, 4)).plot().axes
    assert [bar.get_width() for bar in above.patches][1::2] == [1, 3, 4]
    assert [(bar.get_x(), bar.get_width()) for bar in below.patches] == [(0, 1), (1, 3), (4, 4)]


@pytest.mark.parametrize("lengths", [(), (3, 0)])
def test_a_batch_without_tokens_has_no_picture(lengths):
    with pytest.raises(PadfreeError, match="a batch has examples of a token at least"):
        BatchPicture(lengths)
