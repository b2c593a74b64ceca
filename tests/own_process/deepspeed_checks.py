"""DeepSpeed's ZeRO on two CPU processes trains a packed row as one process does: `nox -s deepspeed`.

This file is its own worker: `torchrun --nproc-per-node 2 deepspeed_checks.py FOLDER`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist

from helpers.comparison import SAME_LOSS, SAME_WEIGHTS
from helpers.two_processes import OF_RANK, batch_of, llama, torchrun
from padfree_patch import apply

STAGES = (0, 1, 2, 3)
LEARNING_RATE = 0.5
STEPS = 2


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)  # its steps show the gradients' scale


def trained(stage):
    """Loss of the last step over both ranks' tokens, and the weights after it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = apply(llama())
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # or it would hide the scale; the default is 1
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)
    batch = batch_of(OF_RANK[rank])
    counts = torch.zeros(world)
    counts[rank] = (batch["labels"] != -100).sum()
    dist.all_reduce(counts)
    for _ in range(STEPS):
        loss = engine(**batch).loss * counts[rank] / counts.sum()
        engine.backward(loss * world)  # it averages over the ranks
        engine.step()
    total = loss.detach().clone()
    dist.all_reduce(total)
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        return {"loss": total, "weights": {name: p.detach().clone() for name, p in model.named_parameters()}}


def main(folder: Path) -> None:
    deepspeed.init_distributed("gloo")
    found = {stage: trained(stage) for stage in STAGES}
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    ranks, ended = torchrun(Path(__file__), tmp_path_factory.mktemp("ranks"))
    assert ended.returncode == 0, ended.stdout[-5000:]
    return ranks


@pytest.mark.parametrize("stage", STAGES)
def test_zero_trains_like_one_process(found, measured, stage):
    model, batch = apply(llama()), batch_of(slice(None))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optimizer_of(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    for rank in found:
        ways = [(rank[stage]["weights"][name] - each, each - before[name]) for name, each in model.named_parameters()]
        apart = max((difference.norm() / way.norm()).item() for difference, way in ways)
        loss_apart = abs(rank[stage]["loss"] - loss).item()
        assert apart <= SAME_WEIGHTS and loss_apart <= SAME_LOSS
        claim = f"DeepSpeed ZeRO-{stage}, two processes against one"
        measured(claim, library="deepspeed", steps=STEPS, loss=loss_apart, weights=apart)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
