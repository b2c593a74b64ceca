"""A training step on examples that share prompts: each prompt once, against the padding-free row of whole examples.

    .venv/bin/nox -s benchmark -- shared_prompts

Forward and backward of a Llama with random weights, as wide as SmolLM2-135M. Both kinds get the same examples in turn,
and are timed in processor seconds of the process, so that other programs on the machine count for neither.
"""

from __future__ import annotations

import time
from typing import Any

import click
import torch
from common import COLOURS, median_of, progress, save, small_model
from matplotlib.figure import Figure

from padfree_patch import DataCollatorWithFlattening, applied
from padfree_patch.batch.labels import IGNORED_LABEL

KINDS = ("whole examples", "shared prompts")
LAYERS, VOCABULARY = 4, 8192
EXAMPLES = 8
"""In each row: four pairs, or one group of eight."""


@click.command()
@click.option("--completion", default=64, show_default=True, help="Tokens of each completion.")
@click.option("--rounds", default=5, show_default=True, help="Batches of each shape; both kinds get each.")
@click.option("--group", "groups", multiple=True, type=int, default=(2, 8), show_default=True)
@click.option("--ratio", "ratios", multiple=True, type=int, default=(1, 4, 16), show_default=True)
def main(completion: int, rounds: int, groups: tuple[int, ...], ratios: tuple[int, ...]) -> None:
    """Time every shape."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = small_model(layers=LAYERS, vocabulary=VOCABULARY).train()
    found = []
    with progress() as bar, applied(model):
        shapes = [(group, ratio) for group in groups for ratio in ratios]
        task = bar.add_task("", total=len(shapes))
        for group, ratio in shapes:
            bar.update(task, description=f"{group} completions, prompt {ratio}:1")
            found.append(measured(model, group, ratio * completion, completion, rounds))
            print({name: found[-1][name] for name in ("group", "prompt", "speedup")}, flush=True)
            bar.advance(task)
    settings = {"layers": LAYERS, "vocabulary": VOCABULARY, "completion": completion, "examples": EXAMPLES}
    save("shared_prompts", {**settings, "shapes": found}, picture(found))


def measured(model: Any, group: int, prompt: int, completion: int, rounds: int) -> dict[str, Any]:
    """Returns the seconds of both kinds of step, by round, their losses, and how much faster one is."""
    generator = torch.Generator().manual_seed(group * prompt)
    collators = [
        DataCollatorWithFlattening(return_flash_attn_kwargs=True),
        DataCollatorWithFlattening(share_prefixes=True),
    ]
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    apart, tokens = 0.0, {}
    for number in range(rounds + 1):
        examples = [each for _ in range(EXAMPLES // group) for each in drawn(generator, group, prompt, completion)]
        losses = []
        for kind, collate in sorted(zip(KINDS, collators), reverse=number % 2 == 1):
            batch = collate(examples)
            tokens[kind] = batch["input_ids"].numel()
            taken, loss = timed_step(model, batch)
            losses.append(loss)
            if number:  # the first one warms up
                seconds[kind].append(taken)
        apart = max(apart, abs(losses[0] - losses[1]) / losses[0])
    return {
        "group": group,
        "prompt": prompt,
        "tokens": tokens,
        "seconds": seconds,
        "ratio_of_tokens": tokens[KINDS[0]] / tokens[KINDS[1]],
        "speedup": median_of(whole / shared for whole, shared in zip(*(seconds[kind] for kind in KINDS))),
        "largest_difference_of_loss": apart,
    }


def drawn(generator: torch.Generator, group: int, prompt: int, completion: int) -> list[dict[str, Any]]:
    """Makes a group of random completions on one random prompt, of which only the completions have labels."""
    first, *rest = (
        torch.randint(VOCABULARY, (length,), generator=generator) for length in (prompt, *[completion] * group)
    )
    unlabelled = torch.full_like(first, IGNORED_LABEL)
    return [{"input_ids": torch.cat([first, each]), "labels": torch.cat([unlabelled, each])} for each in rest]


def timed_step(model: Any, batch: dict[str, Any]) -> tuple[float, float]:
    """Returns the processor seconds of one forward and backward, and the loss; the gradients are dropped."""
    start = time.process_time()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    taken = time.process_time() - start
    model.zero_grad(set_to_none=True)
    return taken, loss.item()


def picture(found: list[dict[str, Any]]) -> Figure:
    """Draws the speed-up of each shape beside the ratio of its tokens."""
    groups = list(dict.fromkeys(each["group"] for each in found))
    figure = Figure(figsize=(3.6 * len(groups), 3.2), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups):
        rows = [each for each in found if each["group"] == group]
        for offset, name, values, colour in (
            (-0.2, "ratio of tokens", [each["ratio_of_tokens"] for each in rows], COLOURS["padded"]),
            (0.2, "speed-up", [each["speedup"]["median"] for each in rows], COLOURS["packed"]),
        ):
            bars = axes.bar([i + offset for i in range(len(rows))], values, width=0.36, color=colour, label=name)
            axes.bar_label(bars, fmt="%.2f", fontsize=7)
        axes.axhline(1, color="black", linewidth=0.6)
        axes.set_xticks(range(len(rows)), [f"prompt {each['prompt']}" for each in rows])
        axes.set_title(f"{group} completions on each prompt")
    figure.axes[0].set_ylabel("over whole examples, padding-free")
    figure.axes[0].legend(frameon=False, fontsize=7)
    return figure


if __name__ == "__main__":
    main()
