"""What a patched model saves loads anywhere without this package, and a run goes on where it was saved or killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

import padfree_patch
from helpers import killed_run
from helpers.killed_run import saving_trainer
from padfree_patch import PaddingFreeCallback, TokenBudgetBatchSampler
from padfree_patch.testing import examples

LOAD = """
import sys
for name in [name for name in sys.modules if "padfree" in name]:
    del sys.modules[name]  # an editable install's finder
sys.modules["padfree_patch"] = None  # importing it is an error from here on
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.load(sys.argv[2])).logits, sys.argv[2])
"""


@pytest.fixture(autouse=True)
def _trusting_torch_load(monkeypatch):
    """Trainers of before torch 2.6 load numpy's random state without saying that they trust it."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


pytestmark = [
    pytest.mark.versions,
    pytest.mark.slow,
    pytest.mark.xdist_group("saving"),  # one process makes `whole`, and only once
    pytest.mark.filterwarnings("ignore:Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD detected:UserWarning"),
]


def test_saved_model_loads_without_us(llama, tmp_path):
    (tokens,) = examples((9,))
    with torch.no_grad():
        expected = llama(input_ids=tokens).logits
    llama.save_pretrained(tmp_path / "before")
    padfree_patch.apply(llama).save_pretrained(tmp_path / "after")
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("before", "after")]
    assert files[0] == files[1]
    torch.save(tokens, tmp_path / "tokens.pt")
    arguments = [str(tmp_path / "after"), str(tmp_path / "tokens.pt")]
    subprocess.run([sys.executable, "-c", LOAD, *arguments], check=True, timeout=120)
    torch.testing.assert_close(torch.load(tmp_path / "tokens.pt"), expected)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Losses of a run that nothing interrupts, and what its checkpoints hold."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = saving_trainer(folder)
    trainer.train()
    return losses_of(trainer), files_in(folder / "checkpoint-4")


def losses_of(trainer):
    return [each["loss"] for each in trainer.state.log_history if "loss" in each]


def files_in(folder):
    return {path.name for path in folder.iterdir()}


def assert_same_losses(trainer, expected, measured, claim):
    """Loss by loss, as logged with four digits; all of them, also those from before it stopped."""
    apart = max(abs(a - b) for a, b in zip(losses_of(trainer), expected, strict=True))
    assert apart <= 1e-4
    measured(claim, library="accelerate", steps=len(expected), loss=apart)


def test_resumed_training_goes_on_with_the_same_losses(tmp_path, measured, whole):
    trainer = saving_trainer(tmp_path)
    trainer.train()
    resumed = saving_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_losses(resumed, whole[0], measured, "Trainer, resumed from a checkpoint")


def test_killed_run_loses_only_what_was_not_saved(tmp_path, measured, whole):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, killed_run.__file__, str(tmp_path)], env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert files_in(tmp_path / "checkpoint-4") == whole[1]
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    resumed = saving_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)  # the last one
    assert_same_losses(resumed, whole[0], measured, "Trainer, killed and resumed")


def test_resumed_training_finds_the_batches_of_its_epoch(tmp_path, measured):
    """With a sampler whose order changes from epoch to epoch, from the middle of the second."""

    def trainer_by_tokens():
        trainer = saving_trainer(tmp_path, max_steps=10, num_train_epochs=3)
        sampler = TokenBudgetBatchSampler([len(each["input_ids"]) for each in trainer.train_dataset], max_tokens=40)
        loader = DataLoader(trainer.train_dataset, batch_sampler=sampler, collate_fn=trainer.data_collator)
        trainer.get_train_dataloader = lambda: loader
        trainer.add_callback(PaddingFreeCallback())
        return trainer, len(sampler)

    trainer, batches = trainer_by_tokens()
    assert batches < 6 < 2 * batches
    trainer.train()
    resumed, _ = trainer_by_tokens()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    claim = "Trainer, token budget, resumed in the second epoch"
    assert_same_losses(resumed, losses_of(trainer), measured, claim)
