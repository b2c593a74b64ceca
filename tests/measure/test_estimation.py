"""The estimate is what counting every padded batch says, and what a padded model then does."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from padfree_patch import PadfreeError, cli, estimate
from padfree_patch.measure.texts import read_texts, tokenise, train_tokenizer


def test_batches_of_everything_are_counted_exactly():
    """With one batch of all examples the order does not matter: 4 x 40 tokens padded, 10 + 20 + 30 + 40 real."""
    found = estimate([10, 20, 30, 40], batch_size=4)
    assert found.padding_share == pytest.approx(60 / 160)
    assert found.expected_speedup == pytest.approx(160 / 100)
    assert found.attention_saved == pytest.approx(1 - 3000 / 6400)
    assert (found.tokens_per_step, found.padded_tokens_per_step, found.longest) == (100, 160, 40)


def test_random_batches_are_close_to_the_expectation():
    """Pairs of 10 or 30: three of four are padded to 30, so 50 tokens on average, of which 40 are real."""
    found = estimate([10, 30] * 5000, batch_size=2)
    assert found.padding_share == pytest.approx(1 - 40 / 50, abs=0.01)


def test_equal_lengths_have_no_padding():
    found = estimate([7] * 9, batch_size=4)
    assert (found.padding_share, found.expected_speedup, found.attention_saved) == (0, 1, 0)


@pytest.mark.parametrize(
    ("lengths", "message"), [([5] * 3, "batch of 4 can't be drawn from 3"), ([5, 0, 5, 5], "example 1 has 0 tokens")]
)
def test_what_cannot_be_estimated_is_an_error(lengths, message):
    with pytest.raises(PadfreeError, match=message):
        estimate(lengths, batch_size=4)


@pytest.fixture
def tokenizer(tmp_path):
    words = train_tokenizer(["one two three four five"], vocab_size=300)
    words.save_pretrained(tmp_path / "tokenizer")
    return words


def run(tmp_path, *more):
    options = ["--data", str(tmp_path / "data.jsonl"), "--tokenizer", str(tmp_path / "tokenizer"), "--batch-size", "2"]
    return CliRunner().invoke(cli.cli, ["estimate", *options, *more])


@pytest.mark.parametrize("fields", [("prompt", "completion"), ("text",)], ids="+".join)
def test_command_counts_the_tokens_of_a_file(tmp_path, tokenizer, fields):
    rows = [{field: f"one {number * ' two'}" for field in fields} for number in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    chosen = [part for field in fields for part in ("--field", field)]
    found = run(tmp_path, "--json", *chosen)
    assert found.exit_code == 0, found.output
    texts = read_texts(tmp_path / "data.jsonl", fields)
    lengths = [len(ids) for ids in tokenise(texts, tokenizer, max_length=2048)]
    assert json.loads(found.output)["longest"] == max(lengths)
    assert json.loads(found.output)["expected_speedup"] == estimate(lengths, batch_size=2).expected_speedup
    assert "expected speed-up" in run(tmp_path, *chosen).output
    assert json.loads(run(tmp_path, "--json", "--max-length", "3", *chosen).output)["longest"] == 3


def test_command_says_what_is_wrong(tmp_path, tokenizer):
    assert "data.jsonl' cannot be read" in str(run(tmp_path).exception)
    (tmp_path / "data.jsonl").write_text('{"question": "a"}\n')
    assert "line 1: expected a string in field 'prompt', found only the keys ['question']" in str(
        run(tmp_path).exception
    )
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    (tmp_path / "tokenizer" / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    assert "no tokenizer can be loaded from" in str(run(tmp_path).exception)


def test_padding_share_is_that_of_the_batches_a_collator_pads():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 50, (600,), generator=generator).tolist()
    shuffled = torch.tensor(lengths)[torch.randperm(600, generator=generator)].split(4)
    padded = sum(torch.nn.utils.rnn.pad_sequence([torch.ones(n) for n in batch]).numel() for batch in shuffled)
    assert estimate(lengths, batch_size=4).padding_share == pytest.approx(1 - sum(lengths) / padded, abs=0.02)
