"""A CUDA device: how exact each backend is, what a step takes, what memory it needs, how often it waits.

    .venv/bin/nox -s gpu                                     # with CUDA, on the torch and transformers that are there
    python benchmarks/gpu.py --only steps --rounds 5         # the same by hand

It needs no network. "packed" is the padding-free step; every kind of step gets the same examples in turn, and new ones
every round. Errors are of bfloat16 against float32 on the CPU, over those that upstream makes on each example alone.
docs/benchmarks/gpu.json is written after each section, so that a run that is cut off leaves what it measured, and keeps
the sections of an earlier run, on the same card with the same libraries, that this one leaves out.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable
from typing import Any

import click
import torch
import transformers
from common import RESULTS, environment
from gpu_counts import counts_of, peak_of
from gpu_exactness import attention_errors, model_errors
from gpu_found import found_models
from gpu_past import labelled_steps, shared_steps

from padfree_patch import applied, attention
from padfree_patch.measure.step import flan_like_lengths, step_batches, timed_step

Step = Callable[[dict[str, Any]], float]
"""Takes the batches of one round in every form, and returns seconds."""
SECTIONS = ("exactness", "found", "steps", "compiled", "labelled", "shared")
WIDTHS = {
    "8B-like": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "1.7B-like": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 32},
}


@click.command()
@click.option("--only", "sections", multiple=True, type=click.Choice(SECTIONS), default=SECTIONS)
@click.option("--layers", default=4, show_default=True, help="Layers of the models that are timed.")
@click.option("--batch-size", "batch_sizes", multiple=True, type=int, default=(16, 32), show_default=True)
@click.option("--rounds", default=6, show_default=True, help="Batches per width and batch size.")
@click.option("--model", "models", multiple=True, help="Model types whose exactness is measured; all by default.")
@click.option("--device", default="cuda", show_default=True)
def main(
    sections: tuple[str, ...],
    layers: int,
    batch_sizes: tuple[int, ...],
    rounds: int,
    models: tuple[str, ...],
    device: str,
) -> None:
    """Measure, and write after each section."""
    torch.manual_seed(0)
    card = torch.cuda.get_device_name() if device == "cuda" else device
    found: dict[str, Any] = {"environment": {**environment(), "card": card, "cuda": torch.version.cuda}}
    found["backends"] = {each.NAME: each.refusal(needs(device)) for each in attention.BACKENDS}
    print(json.dumps({name: found[name] for name in ("environment", "backends")}, indent=1), flush=True)
    found |= earlier(found["environment"])
    names = [name for name, refusal in found["backends"].items() if refusal is None]
    for section in sections:
        if section == "exactness":
            found[section] = {"models": model_errors(names, device, models), "attention": attention_errors(device)}
        elif section == "found":
            found[section] = found_models(rounds, device)
        elif section == "steps":
            found[section] = [
                steps(width, layers, size, rounds, names, device) for width in WIDTHS for size in batch_sizes
            ]
        elif section == "labelled":
            found[section] = labelled_steps(model_of("8B-like", layers, device, vocabulary=128256), rounds, device)
        elif section == "shared":
            found[section] = shared_steps(model_of("8B-like", layers, device), rounds, device)
        else:
            found[section] = [compiled(name, layers, device) for name in names]
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found[section], indent=1), flush=True)


def earlier(here: dict[str, Any]) -> dict[str, Any]:
    """Returns the sections that an earlier run left, if it was on the same card with the same libraries."""
    file = RESULTS / "gpu.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    there = before.get("environment", {})
    same = all(there.get(name) == here[name] for name in ("card", "torch", "cuda", "transformers"))
    return {name: before[name] for name in SECTIONS if same and name in before}


def needs(device: str) -> attention.Needs:
    """Returns what a layer of these models asks of a backend."""
    return attention.Needs(device, torch.bfloat16, 128)


def model_of(width: str, layers: int, device: str, implementation: str = "sdpa", vocabulary: int = 32000) -> Any:
    """Makes a Llama with random weights in bfloat16, on the device."""
    config = transformers.LlamaConfig(
        **WIDTHS[width], num_hidden_layers=layers, vocab_size=vocabulary, max_position_embeddings=65536
    )
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=implementation, dtype=torch.bfloat16
        )


def steps(width: str, layers: int, batch_size: int, rounds: int, names: list[str], device: str) -> dict[str, Any]:
    """Returns seconds per round and kind, peak memory that a step adds, kernel launches and syncs."""
    model = model_of(width, layers, device)
    kinds = kinds_of(model, names)
    runs = []
    for seed in range(rounds + 2):
        batches = drawn(batch_size, seed, device)
        order = list(kinds)[seed % len(kinds) :] + list(kinds)[: seed % len(kinds)]
        runs.append(
            {
                "tokens": batches["packed"]["input_ids"].numel(),
                "padded_tokens": batches["padded"]["input_ids"].numel(),
                "found": {kind: peak_of(functools.partial(kinds[kind], batches), device) for kind in order},
            }
        )
    runs = runs[2:]  # the first two warm up: flex compiles, the allocator grows
    last = drawn(batch_size, rounds + 1, device)
    counts = (
        {kind: counts_of(functools.partial(step, last)) for kind, step in kinds.items()} if device == "cuda" else {}
    )
    return {"width": width, "layers": layers, "batch_size": batch_size, "rounds": runs, "counts": counts}


def kinds_of(model: Any, names: list[str]) -> dict[str, Step]:
    """Returns the kinds of step: upstream's with each way it has to compute attention, and ours with each backend."""
    ways = {"sdpa": upstream(model, "sdpa"), "sdpa without cuDNN": upstream(model, "sdpa", cudnn=False)}
    if "flash_attn" in names:
        ways["flash_attention_2"] = upstream(model, "flash_attention_2")
    kinds: dict[str, Step] = {
        f"{kind}, {way}": functools.partial(run, kind)
        for way, run in ways.items()
        for kind in ("padded", "native", "ceiling")
    }
    for name in names:
        kinds[f"packed, {name}"] = functools.partial(packed, model, name)
    return kinds


def upstream(model: Any, implementation: str, *, cudnn: bool = True) -> Callable[[str, dict[str, Any]], float]:
    """Returns what times a step of the unpatched model. cuDNN's attention makes a plan for every shape that is new."""

    def run(kind: str, batches: dict[str, Any]) -> float:
        model.set_attn_implementation(implementation)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        try:
            return timed_step(model, batches[kind], patched=False)
        finally:
            torch.backends.cuda.enable_cudnn_sdp(True)
            model.set_attn_implementation("sdpa")

    return run


def packed(model: Any, backend: str, batches: dict[str, Any]) -> float:
    """Times a padding-free step."""
    return timed_step(model, batches["packed"], patched=True, backend=backend)


def drawn(batch_size: int, seed: int, device: str) -> dict[str, dict[str, Any]]:
    """Returns one batch of random tokens with flan-like lengths, in every form of a step."""
    generator = torch.Generator().manual_seed(seed)
    lengths = flan_like_lengths(batch_size, generator)
    return step_batches([torch.randint(32000, (n,), generator=generator) for n in lengths], device)


def compiled(name: str, layers: int, device: str) -> dict[str, Any]:
    """Returns the seconds of a packed step with and without torch.compile, and the difference of the losses."""
    model = model_of("1.7B-like", layers, device).train()
    batches = [drawn(16, seed, device)["packed"] for seed in range(6)]
    with applied(model, verify=False, backend=name):
        as_it_is = [model(**batch, use_cache=False).loss.item() for batch in batches]
        before = [timed_step(model, batch, patched=False) for batch in batches][2:]
        model.compile(dynamic=True)
        losses = [model(**batch, use_cache=False).loss.item() for batch in batches]
        after = [timed_step(model, batch, patched=False) for batch in batches][2:]
    differences = [abs(one - other) for one, other in zip(as_it_is, losses)]
    return {
        "backend": name,
        "seconds": statistics.median(before),
        "compiled_seconds": statistics.median(after),
        "largest_difference_of_loss": max(differences),
    }


if __name__ == "__main__":
    main()
