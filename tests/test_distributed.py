"""Two gloo processes that hold different numbers of sequences end with one process's loss and gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch


@pytest.mark.parametrize("way", distributed_worker.WAYS)
def test_two_processes_are_one(tmp_path, way):
    worker = Path(distributed_worker.__file__)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*sys.path, str(worker.parent)])}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), way, str(tmp_path), str(rank)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            said, _ = rank.communicate(timeout=120)  # a hang is a failure
            assert rank.returncode == 0, said[-3000:]
    finally:
        for rank in ranks:
            rank.kill()
    found = torch.load(tmp_path / "found.pt")
    model = distributed_worker.model_here()
    batch = distributed_worker.batch_of(slice(None))
    loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(found["loss"], loss.detach())
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert set(found["gradients"]) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-6)  # sums in another order
