"""The code on docs/training.md runs as it stands there, and does what the text says."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pytest
import torch
from two_processes import dispatching

from padfree_patch.batch.sequences import PackedSequences
from padfree_patch.measure.texts import train_tokenizer

pytestmark = pytest.mark.versions


PAGE = Path(__file__).parents[1] / "docs" / "training.md"


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_training_page(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["one", "two", "three", "four", "five", "six", "seven", "answer"]
    rows = [
        {"prompt": " ".join(words[: 1 + i % 5]), "completion": " ".join(words[i % 3 : 3 + i % 4])} for i in range(24)
    ]
    tokenizer = train_tokenizer([" ".join(words)] * 4, vocab_size=260)
    llama.resize_token_embeddings(len(tokenizer))
    names = {"model": llama, "tokenizer": tokenizer, "texts": datasets.Dataset.from_list(rows)}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 9
    logs = []
    for block in blocks:
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


FAULTS = PAGE.with_name("faults.md")


def test_every_fault_is_still_found_by_a_test():
    """What docs/faults.md names exists, and carries the mark where the page says so."""
    here = Path(__file__).parent
    texts = {path.name: path.read_text() for path in here.rglob("*.py") if path.name != Path(__file__).name}
    for row in FAULTS.read_text().splitlines():
        if not row.startswith("| ") or row.startswith("| fault"):
            continue
        _, _, tests, runs = row.strip("| ").split(" | ")
        files = []
        for name in re.findall(r"`(test_\w+(?:\.py)?|\w+_checks?\.py)`", tests):
            found = [text for file, text in texts.items() if file == name or f"def {name}(" in text]
            assert found, f"{name} is no test any more"
            files += found
        if runs.startswith("marked"):
            assert any("mark.versions" in text for text in files), row
