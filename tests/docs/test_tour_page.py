"""The code on docs/tour.md runs as it stands there, and the page's pictures are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from matplotlib.image import imread

from helpers.recipes import WORDS, sentence
from padfree_patch.measure.texts import train_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "tour.md"


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_every_block_of_the_page_runs(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer([" ".join(WORDS)] * 4, vocab_size=280)
    llama.resize_token_embeddings(len(tokenizer))
    names = {"model": llama, "tokenizer": tokenizer, "texts": [sentence(i, 1 + 3 * (i % 7)) for i in range(24)]}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert not names["before"].ok and names["after"].ok  # the first is the control
    assert imread("before.png").any()
    assert 0 < names["estimate"].padding_share < 1
    logs = [each for each in names["trainer"].state.log_history if "padding_saved" in each]
    assert len(logs) == 3 and all(each["sequences_per_row"] == 8 for each in logs)


def test_pictures_of_the_page_are_there():
    pictures = re.findall(r"\]\((\S+\.png)\)", PAGE.read_text())
    assert len(pictures) == 2 and all(imread(PAGE.parent / each).any() for each in pictures)
