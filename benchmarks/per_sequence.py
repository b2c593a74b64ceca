"""Models that no patch is registered for: what running upstream's code on each sequence costs.

    .venv/bin/nox -s benchmark -- per_sequence

Forward and backward of four layers with random weights, of architectures that each need another way. "Row" is the same
packed row unpatched, which mixes its examples; "one by one" is a step for each example, unpatched. Processor seconds of
one thread.
"""

from __future__ import annotations

import time
from typing import Any

import click
import torch
import transformers
from common import COLOURS, NAMES, legend_above, median_of, progress, save
from matplotlib.figure import Figure

from padfree_patch import applied
from padfree_patch.measure.step import flan_like_lengths, step_batches, timed_step
from padfree_patch.patching import way_of

COMMON: dict[str, Any] = {"vocab_size": 8192, "num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 512}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**COMMON, **HEADS},
    "qwen3_next": {
        **COMMON,
        **HEADS,
        **EXPERTS,
        "num_experts": 4,
        "shared_expert_intermediate_size": 128,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    },
    "mamba2": {
        "vocab_size": 8192,
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "num_heads": 8,
        "head_dim": 64,
        "state_size": 64,
        "n_groups": 1,
        "chunk_size": 64,
    },
    "lfm2": {**COMMON, **HEADS, "layer_types": ["conv", "full_attention"] * 2},
    "gpt_oss": {**COMMON, **HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128},
    "gemma3_text": {**COMMON, **HEADS, "sliding_window": 128},
    "deepseek_v3": {
        **COMMON,
        **EXPERTS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 48,
        "v_head_dim": 32,
    },
}
KINDS = ("padded", "packed", "row", "one by one")


@click.command()
@click.option("--batch-size", default=8, show_default=True)
@click.option("--rounds", default=5, show_default=True, help="Batches of new lengths; every kind gets each.")
def main(batch_size: int, rounds: int) -> None:
    """Time every architecture."""
    torch.set_num_threads(1)
    found = []
    with progress() as bar:
        task = bar.add_task("", total=len(MODELS))
        for model_type in MODELS:
            bar.update(task, description=model_type)
            found.append(measured(model_type, batch_size, rounds))
            print(model_type, found[-1]["way"], found[-1]["ratios"], flush=True)
            bar.advance(task)
    save("per_sequence", {"batch_size": batch_size, "models": found}, picture(found))


def measured(model_type: str, batch_size: int, rounds: int) -> dict[str, Any]:
    """Returns the seconds of each kind of step, by round, and how padding-free compares with the others."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[model_type](**MODELS[model_type])
    model = transformers.AutoModelForCausalLM.from_config(config)
    with applied(model):
        way = way_of(model) or "registered patch"
    generator = torch.Generator().manual_seed(1)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds + 1):
        lengths = flan_like_lengths(batch_size, generator, longest=512)
        examples = [torch.randint(8192, (n,), generator=generator) for n in lengths]
        for kind in KINDS:
            taken = seconds_of(model, examples, kind)
            if number:  # the first one warms up
                seconds[kind].append(taken)
    ratios = {
        kind: median_of(other / packed for other, packed in zip(seconds[kind], seconds["packed"]))
        for kind in KINDS
        if kind != "packed"
    }
    return {"model_type": model_type, "way": way, "seconds": seconds, "ratios": ratios}


def seconds_of(model: Any, examples: list[torch.Tensor], kind: str, device: str = "cpu") -> float:
    """Returns the seconds of a step on some examples."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if kind == "one by one":
        rows = [dict.fromkeys(("input_ids", "labels"), each[None].to(device)) for each in examples]
        return sum(timed_step(model, row, patched=False, clock=clock) for row in rows)
    batches = step_batches(examples, device)
    batch = {name: batches["native"][name] for name in ("input_ids", "labels")} if kind == "row" else batches[kind]
    return timed_step(model, batch, patched=kind == "packed", clock=clock)


def picture(found: list[dict[str, Any]]) -> Figure:
    """Draws how many times as fast as each other kind padding-free is."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    names = [each["model_type"] for each in found]
    colours = {"padded": COLOURS["padded"], "row": COLOURS["native"], "one by one": COLOURS["ceiling"]}
    for number, (kind, colour) in enumerate(colours.items()):
        values = [each["ratios"][kind]["median"] for each in found]
        places = [place + 0.27 * (number - 1) for place in range(len(names))]
        axes.bar(places, values, width=0.25, color=colour, label=NAMES.get(kind, kind))
    axes.axhline(1, color="#57606a", linewidth=0.8)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("times as fast")
    legend_above(figure)
    return figure


if __name__ == "__main__":
    main()
