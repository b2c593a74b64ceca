"""The code on docs/training.md runs as it stands there, and does what the text says."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pytest
import torch

from helpers.two_processes import dispatching
from padfree_patch.batch.sequences import PackedSequences
from padfree_patch.measure.texts import train_tokenizer

pytestmark = pytest.mark.versions


PAGE = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_every_block_of_the_page_runs_and_does_what_the_text_says(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["one", "two", "three", "four", "five", "six", "seven", "answer"]
    rows = [
        {"prompt": " ".join(words[: 1 + i % 5]), "completion": " ".join(words[i % 3 : 3 + i % 4])} for i in range(24)
    ]
    tokenizer = train_tokenizer([" ".join(words)] * 4, vocab_size=260)
    llama.resize_token_embeddings(len(tokenizer))
    names = {"model": llama, "tokenizer": tokenizer, "texts": datasets.Dataset.from_list(rows)}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 14
    logs = []
    for block in blocks:
        block = block.replace("2048", "64")
        if "dispatch_batches" in dispatching(False):  # as the page says beside it
            block = block.replace('accelerator_config={"dispatch_batches": False}', "dispatch_batches=False")
        exec(compile(block, str(PAGE), "exec"), names)
        logs += [each for each in names["trainer"].state.log_history if "padding_saved" in each and each not in logs]
    assert len(logs) > 3 and all(each["sequences_per_row"] == 4 for each in logs[:3])  # of the first trainer
    assert names["sampler"].max_tokens == 64 >= max(each["longest_row"] for each in logs[3:])
    assert max(len(row) for row in names["packed"]["input_ids"]) <= 64
    assert names["before"] == 6 and names["after"] == len(names["packed"])
    assert (names["batch"]["labels"] == -100).sum() == 2
    assert isinstance(names["sequences"], PackedSequences)
    torch.testing.assert_close(names["pooled"][1], names["second"][-1])
    assert names["log_probs"].shape == (2,)
    assert 0 <= names["metrics"]["eval_accuracy"] <= 1
    assert names["counted"]["eval_examples"] == len(names["texts"])
    _check_group_loss(names, next(block for block in blocks if "GROUP, SHARE" in block))


def _check_group_loss(names, block):
    """Checks that the page's loss of groups, and its gradients, are those of whole answers, from a shorter row."""
    found = []
    for share in ("True", "False"):
        names["model"].zero_grad(set_to_none=True)
        exec(block.replace("GROUP, SHARE = 4, True", f"GROUP, SHARE = 4, {share}"), names)
        gradients = [each.grad for each in names["model"].parameters()]
        found.append((names["row"]["input_ids"].numel(), names["group_loss"].detach(), gradients))
    (tokens, loss, gradients), (more, expected, wanted) = found
    assert tokens < more
    torch.testing.assert_close((loss, gradients), (expected, wanted), rtol=1e-3, atol=1e-6)  # of float32, other sums
