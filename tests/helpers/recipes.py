"""Runs a file of examples/ as a user would, and records what its Trainer trained on."""

from __future__ import annotations

import copy
import json
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from padfree_patch import PackedSequences, unpack
from padfree_patch.measure.texts import train_tokenizer
from padfree_patch.testing import TINY

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = ["one", "two", "three", "four", "five", "six", "seven"]


class Step(NamedTuple):
    """The first step of a training: its batch, its loss, and the gradients of the model."""

    batch: dict[str, Any]
    loss: float
    gradients: dict[str, Tensor]

    @property
    def examples(self) -> list[Tensor]:
        """Token ids (length,) each."""
        return unpack(self.batch["input_ids"], self.sequences)

    @property
    def sequences(self) -> PackedSequences:
        return PackedSequences.from_position_ids(self.batch["position_ids"])


def sentence(start: int, words: int) -> str:
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(words))


@contextmanager
def first_step_recorded() -> Iterator[list[Step]]:
    """Yields a list that holds the first step of the next training, once it has been made."""
    steps: list[Step] = []
    original = Trainer.training_step

    def recording(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Tensor:
        batch = copy.copy(inputs)
        loss = original(self, model, inputs, *args, **options)
        if not steps:
            gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
            steps.append(Step(batch, float(loss), gradients))
        return loss

    with mock.patch.object(Trainer, "training_step", recording):
        yield steps


def save_tiny_model(folder: Path, chat_template: str | None = None) -> None:
    """Writes a tiny Llama with random weights and a tokenizer for `WORDS` into a folder."""
    tokenizer = train_tokenizer([" ".join(WORDS)] * 4, vocab_size=280)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    end = tokenizer.eos_token_id
    torch.manual_seed(0)
    config = LlamaConfig(**{**TINY, "vocab_size": len(tokenizer), "pad_token_id": end, "eos_token_id": end})
    LlamaForCausalLM(config).save_pretrained(folder)


def run(name: str, model: Path, rows: list[dict[str, Any]], folder: Path, *, out: bool = True) -> dict[str, Any]:
    """Runs a recipe on a model's folder and rows of data; returns the recipe's globals."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    arguments = [name, str(model), str(data), *([str(folder / "out")] if out else [])]
    with mock.patch.object(sys, "argv", arguments):
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def language_loss(model: Any, examples: list[Tensor], labels: list[Tensor]) -> Tensor:
    """Computes the mean loss over all labels, each example run alone."""
    losses, count = [], 0
    for ids, wanted in zip(examples, labels):
        logits = model(input_ids=ids[None]).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, wanted[1:], ignore_index=-100, reduction="sum"))
        count += int((wanted[1:] != -100).sum())
    return torch.stack(losses).sum() / count


def assert_is_step_of(step: Step, model: Any, loss: Tensor) -> None:
    """Asserts that a step has the loss of an oracle that was run on this unpatched model, and its gradients."""
    model.zero_grad()
    loss.backward()
    torch.testing.assert_close(step.loss, loss.item(), rtol=2e-5, atol=2e-5)
    assert step.gradients
    for name, gradient in step.gradients.items():
        expected = model.get_parameter(name).grad
        assert (gradient - expected).norm() <= 2e-4 * expected.norm() + 1e-7, name
