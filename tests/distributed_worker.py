"""One of two processes that train a tiny Llama together: `distributed_worker.py WAY FOLDER RANK`.

Rank 0 holds five sequences, rank 1 two, in packed rows. Writes the loss and the gradients that they end with to FOLDER.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn

from padfree_patch import DataCollatorWithFlattening, apply
from padfree_patch.registry import registry
from padfree_patch.testing import examples, tiny_model

LENGTHS = (5, 9, 1, 12, 3, 20, 6)
OF_RANK = (slice(0, 5), slice(5, 7))
STEPS = 2


def batch_of(which):
    found = [{"input_ids": each[0].tolist()} for each in examples(LENGTHS)[which]]
    return DataCollatorWithFlattening(return_flash_attn_kwargs=True)(found)


def model_here():
    return apply(tiny_model(registry().get("llama"), "sdpa"))


def trained_tokens(batch):
    return int((batch["labels"] != -100).sum())


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
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, lambda: {n: p.grad.full_tensor() for n, p in model.named_parameters()}


WAYS = {"ddp": data_parallel, "fsdp1": fully_sharded_1, "fsdp2": fully_sharded_2}


def main(way: str, folder: str, rank: int) -> None:
    world = len(OF_RANK)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    model, gradients = WAYS[way](model_here())
    batch = batch_of(OF_RANK[rank])
    counts = torch.zeros(world)
    counts[rank] = trained_tokens(batch)
    dist.all_reduce(counts)
    for _ in range(STEPS):  # the second with other boundaries than the first
        model.zero_grad()
        loss = model(**batch).loss * counts[rank] / counts.sum()  # of the tokens of both ranks
        (loss * world).backward()  # these wrappers average over the ranks
        total = loss.detach().clone()
        dist.all_reduce(total)
    found = gradients()
    if rank == 0:
        torch.save({"loss": total, "gradients": found}, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
