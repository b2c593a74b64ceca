"""A run that is killed in its fifth step, like a preempted one, after it saved two steps and four: for test_saving.py.

killed_run.py FOLDER
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from transformers import TrainerCallback

from helpers.training import flattening, trainer_of
from padfree_patch import apply
from padfree_patch.registry import registry
from padfree_patch.testing import tiny_model


class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)


def saving_trainer(folder, **options):
    """Of a patched model, that saves every second of six steps, with an optimizer that has a state."""
    model = apply(tiny_model(registry().get("llama"), "sdpa"))
    trainer = trainer_of(model, folder, flattening(), **{"max_steps": 6, "optim": "adamw_torch", **options})
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 2
    trainer.state.save_steps = 2
    return trainer


if __name__ == "__main__":
    trainer = saving_trainer(Path(sys.argv[1]))
    trainer.add_callback(Kill())
    trainer.train()
