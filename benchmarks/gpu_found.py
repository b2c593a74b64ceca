"""On a device, models that no patch is registered for: how exact the way is that `apply` finds, what a step takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from gpu_counts import counts_of
from per_sequence import KINDS, MODELS, seconds_of

from padfree_patch import applied
from padfree_patch.measure.step import flan_like_lengths
from padfree_patch.patching import way_of
from padfree_patch.testing import examples, pack
from padfree_patch.testing.conformance import alone_loss_and_gradients

LENGTHS = (5, 9, 1, 130, 12)
WIDER = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_heads", "n_groups")
"""What grows with the width of a model; the sizes of heads, states and experts stay."""


def found_model(model_type: str, times: int = 1) -> Any:
    """Makes the same model with random weights on every call, in float32 on the CPU, `times` as wide as on a CPU."""
    values = {name: value * times if name in WIDER else value for name, value in MODELS[model_type].items()}
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[model_type](**values)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def found_models(rounds: int, device: str, times: int = 4, batch_size: int = 16) -> list[dict[str, Any]]:
    """Returns for each model the way that `apply` found, how exact it is, and the seconds of each kind of step."""
    found = []
    for model_type in MODELS:
        found.append(
            {
                "model": model_type,
                **errors(lambda model_type=model_type: found_model(model_type).to(device), device),
                **steps(found_model(model_type, times).bfloat16().to(device), rounds, device, batch_size),
            }
        )
        print(found[-1], flush=True)  # a run that is cut off leaves at least this
    return found


def errors(make: Callable[[], Any], device: str) -> dict[str, Any]:
    """Returns the way that `apply` found, and the largest difference of loss and gradients from each example alone.

    In float32: a router that picks another expert by rounding would say nothing about the attention.
    """
    sequences = [each.to(device) for each in examples(LENGTHS)]
    loss, gradients = alone_loss_and_gradients(make, sequences)
    with applied(make()) as model:
        batch = {name: value.to(device) for name, value in pack(sequences).items()}
        packed = model.train()(**batch, labels=batch["input_ids"], use_cache=False).loss
        packed.backward()
        way = way_of(model) or "registered patch"
        off = [
            float((each.grad - gradients[name]).norm() / gradients[name].norm())
            for name, each in model.named_parameters()
            if name in gradients and gradients[name].norm() > 1e-6
        ]
    return {"way": way, "loss": abs(float(packed.detach()) - float(loss)), "gradients": max(off)}


def steps(model: Any, rounds: int, device: str, batch_size: int) -> dict[str, Any]:
    """Returns the seconds of each kind of step of one model by round, and on CUDA its kernels and syncs."""
    generator = torch.Generator().manual_seed(1)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds + 2):
        lengths = flan_like_lengths(batch_size, generator)
        tokens = [torch.randint(8192, (n,), generator=generator) for n in lengths]
        for kind in KINDS:
            taken = seconds_of(model, tokens, kind, device)
            if number > 1:  # the first two warm up
                seconds[kind].append(taken)
    counts = {}
    if device == "cuda":
        counts = {kind: counts_of(functools.partial(seconds_of, model, tokens, kind, device)) for kind in KINDS}
    return {"seconds": seconds, "counts": counts}
