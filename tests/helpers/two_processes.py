"""Two processes for test_distributed.py, and what each does: `torchrun --nproc-per-node 2 two_processes.py FOLDER`."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification, TrainingArguments

from helpers.any_decoder import tiny_decoder
from helpers.recipes import run, save_tiny_model, sentence
from helpers.training import Stream, data, flattening, padding, trained, trainer_of
from padfree_patch import (
    DataCollatorForSequenceClassification,
    DataCollatorWithFlattening,
    PaddingFreeCallback,
    TokenBudgetBatchSampler,
    apply,
    pack_dataset,
)
from padfree_patch.integrations.figures import FIGURES, Counts
from padfree_patch.registry import registry
from padfree_patch.testing import examples, tiny_model

LENGTHS = (5, 9, 1, 12, 3, 20, 6)
OF_RANK = (slice(0, 5), slice(5, 7))
STEPS = 2


def llama():
    return tiny_model(registry().get("llama"), "sdpa")


MODELS = {"llama": llama, "gpt2": lambda: tiny_decoder("gpt2"), "mamba2": lambda: tiny_decoder("mamba2")}
"""The second and third have no patch: one answers for all examples at once, one goes through them one by one."""


def _runs_one_token(name) -> bool:
    """Whether upstream runs a text of one token, as one of the batch is: Mamba 2 of 4.47 does not."""
    try:
        with torch.no_grad():
            MODELS[name]()(input_ids=torch.tensor([[3]]))
    except IndexError:
        return False
    return True


HERE = [name for name in MODELS if name in CONFIG_MAPPING and _runs_one_token(name)]


def batch_of(which):
    found = [{"input_ids": each[0].tolist()} for each in examples(LENGTHS)[which]]
    return DataCollatorWithFlattening(return_flash_attn_kwargs=True)(found)


def data_parallel(model):
    return nn.parallel.DistributedDataParallel(model), lambda: {n: p.grad for n, p in model.named_parameters()}


def fully_sharded_1(model):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    wrapped = FSDP(model, device_id=torch.device("cpu"), use_orig_params=True)

    def gradients():
        with FSDP.summon_full_params(wrapped, with_grads=True):
            return {n.replace("_fsdp_wrapped_module.", ""): p.grad.clone() for n, p in wrapped.named_parameters()}

    return wrapped, gradients


def fully_sharded_2(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    (layers,) = (each for each in model.modules() if isinstance(each, nn.ModuleList))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, lambda: {n: p.grad.full_tensor() for n, p in model.named_parameters()}


WAYS = {"ddp": data_parallel, "fsdp1": fully_sharded_1, "fsdp2": fully_sharded_2}


def loss_and_gradients(make, wrap):
    """Of both ranks' tokens: five sequences here, two there."""
    rank = dist.get_rank()
    model, gradients = wrap(apply(make()))
    batch = batch_of(OF_RANK[rank])
    counts = torch.zeros(dist.get_world_size())
    counts[rank] = (batch["labels"] != -100).sum()
    dist.all_reduce(counts)
    for _ in range(STEPS):
        model.zero_grad()
        loss = model(**batch).loss * counts[rank] / counts.sum()
        (loss * dist.get_world_size()).backward()  # these wrappers average over the ranks
        total = loss.detach().clone()
        dist.all_reduce(total)
    return {"loss": total, "gradients": {name: each.clone() for name, each in gradients().items()}}


def trained_by_tokens(folder):
    """Two epochs of batches by a token budget: the weights, and the steps that the Trainer took and should take."""
    trainer = trainer_of(apply(llama()), folder, flattening(), max_steps=-1, num_train_epochs=2)
    lengths = [len(each["input_ids"]) for each in trainer.train_dataset]
    ranks = {"num_replicas": dist.get_world_size(), "rank": dist.get_rank()}
    sampler = TokenBudgetBatchSampler(lengths, max_tokens=25, **ranks)
    loader = DataLoader(trainer.train_dataset, batch_sampler=sampler, collate_fn=trainer.data_collator)
    trainer.get_train_dataloader = lambda: loader
    trainer.train()
    return list(trainer.model.parameters()), (trainer.state.global_step, 2 * len(sampler))


def figures(folder):
    """The callback's: of counts that are given, a thousand seconds after they began, and of a training."""
    rank = dist.get_rank()
    began = time.perf_counter() - 1000
    counts = Counts(began, tokens=10000 * (rank + 1), rows=1 + rank, sequences=8, padded_tokens=120000)
    trainer = trainer_of(apply(llama()), folder, flattening(), per_device_train_batch_size=2)
    trainer.add_callback(PaddingFreeCallback(patience=2))
    trainer.train()
    logged = [{name: each[name] for name in FIGURES} for each in trainer.state.log_history if FIGURES[0] in each]
    return counts.figures(torch.device("cpu")), logged


def classified(rank=None):
    """The loss and the gradients of a classifier's four texts: of a rank's under DDP, or of all, each alone."""
    torch.manual_seed(0)
    config = copy.deepcopy(llama().config)
    config.num_labels = 3
    model = AutoModelForSequenceClassification.from_config(config)
    texts, labels = [each[0] for each in examples((5, 9, 4, 12))], torch.tensor([0, 2, 1, 1])
    if rank is None:
        logits = torch.cat([model(input_ids=ids[None]).logits for ids in texts])
        loss = torch.nn.functional.cross_entropy(logits, labels)
    else:
        mine = slice(2 * rank, 2 * rank + 2)
        rows = [{"input_ids": ids.tolist(), "label": int(label)} for ids, label in zip(texts[mine], labels[mine])]
        wrapped = nn.parallel.DistributedDataParallel(apply(model))
        loss = wrapped(**DataCollatorForSequenceClassification()(rows)).loss
    loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters()}


def recipe(folder):
    """The weights that examples/token_budget.py ends with, and the losses that it logs."""
    save_tiny_model(folder / "model")  # of which transformers writes rank 0's only
    dist.barrier()
    rows = [{"text": sentence(i, 3 + 5 * (i % 4))} for i in range(24)]
    trainer = run("token_budget.py", folder / "model", rows, folder / str(dist.get_rank()))["trainer"]
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    return [each.detach() for each in trainer.model.parameters()], losses


def dispatching(flag):
    """Whether one process reads and deals out, under the version's name for it."""
    new = "accelerator_config" in {field.name for field in fields(TrainingArguments)}
    return {"accelerator_config": {"dispatch_batches": flag}} if new else {"dispatch_batches": flag}


def torchrun(worker: Path, folder: Path) -> tuple[list[dict[str, Any]], subprocess.CompletedProcess[str]]:
    """Runs `worker FOLDER` as two processes: what each wrote to FOLDER/<rank>.pt, and how they ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    ended = subprocess.run(
        [sys.executable, "-m", *launcher, str(worker), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=240,  # a hang is a failure
    )
    files = [folder / f"{rank}.pt" for rank in range(2)]
    assert all(file.exists() for file in files), ended.stdout[-5000:]
    return [torch.load(file, weights_only=False) for file in files], ended


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {(name, way): loss_and_gradients(MODELS[name], wrap) for name in HERE for way, wrap in WAYS.items()}
    dist.barrier()
    few = {"per_device_train_batch_size": 2}
    for name, collator, patched in (("padded", padding, False), ("packed", flattening(), True)):
        found[name] = trained(llama(), folder / name, collator, patched=patched, **few)
    rows = pack_dataset(datasets.Dataset.from_list(data()), 24)
    one = {"per_device_train_batch_size": 1, "dataset": rows}
    found["rows"] = trained(llama(), folder / "rows", flattening(), patched=True, **one)
    found["figures"] = figures(folder / "figures")
    apart = {**few, **dispatching(False), "dataset": Stream()}
    found["stream, padded"] = trained(llama(), folder / "stream", padding, patched=False, **apart)
    found["stream"] = trained(
        llama(), folder / "stream", flattening(return_flash_attn_kwargs=True), patched=True, **apart
    )
    found["budget"], found["budget's steps"] = trained_by_tokens(folder / "budget")
    found["classifier"] = classified(rank)
    found["recipe"] = recipe(folder / "recipe")
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    together = {**few, **dispatching(True), "dataset": Stream()}  # an error, which ends both processes
    trained(llama(), folder / "dealt out", flattening(), patched=True, **together)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
