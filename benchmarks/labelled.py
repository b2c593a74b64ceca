"""A padding-free step with all logits, with those of labelled tokens, and in chunks of them: time and peak memory.

    .venv/bin/nox -s benchmark -- labelled --model DIR --data FILE --data FILE

DIR is SmolLM2-135M as benchmarks/get_smollm2.py makes it; "4 layers" and "1 layer" have its width and vocabulary and
random weights. Time is the process's own CPU time, on one thread, every kind in turn on the same batch, so that other
programs on the machine change the ratios little. Memory is what a step adds to a process of its own.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
from common import NAMES, REAL, SMALL, load, median_of, progress, save, small_model
from matplotlib.figure import Figure
from transformers import AutoTokenizer

from padfree_patch import DataCollatorWithFlattening, applied
from padfree_patch.batch.labels import IGNORED_LABEL
from padfree_patch.measure.memory import peak_bytes, reset_peak, resident_bytes
from padfree_patch.measure.texts import read_texts, shuffled, tokenise

KINDS = ("all", "labelled")
COLOURS = {"all": "#b0b7c3", "labelled": "#1f6feb", "chunked": "#2da44e"}
README = Path(__file__).parents[1] / "README.md"
VOCABULARY = 49152
MEMORY = (("half", ("all", "labelled", "chunked")), ("everything", ("all", "chunked")))
"""Which tokens have a label where memory is measured, and with which logits."""
TOKENS, LENGTH = 4096, 256
"""Of a row, and of its examples, where memory is measured."""


@click.command()
@click.option("--model", "folder", required=True, help="Folder of SmolLM2-135M.")
@click.option("--data", "files", multiple=True, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--batch-size", default=4, show_default=True)
@click.option("--rounds", default=7, show_default=True, help="Batches per data set, 4 layers.")
@click.option("--real-rounds", default=3, show_default=True, help="The same for the real weights.")
@click.option("--max-length", default=1024, show_default=True)
@click.option("--here", type=(str, str), hidden=True, help="Labels and logits to measure in this process.")
def main(
    folder: str,
    files: tuple[Path, ...],
    batch_size: int,
    rounds: int,
    real_rounds: int,
    max_length: int,
    here: tuple[str, str] | None,
) -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    if here:
        print(json.dumps(memory_of_a_step(*here)))
        return
    tokenizer = AutoTokenizer.from_pretrained(folder)
    runs = []
    with progress() as bar:
        task = bar.add_task("", total=2 * len(files) * (rounds + real_rounds))
        for name, count in ((SMALL, rounds), (REAL, real_rounds)):
            model = small_model(vocabulary=VOCABULARY) if name == SMALL else load(folder, name)
            for file in files:
                drawn = examples_from(file, tokenizer, count=batch_size * count, max_length=max_length)
                for trained in ("completions", "everything"):
                    data = file.name.split(".")[0]
                    bar.update(task, description=f"{name}, {data}, {trained}")
                    batches = [batch_of(drawn[i : i + batch_size], trained) for i in range(0, len(drawn), batch_size)]
                    seconds_of(model, batch_of([{"input_ids": drawn[0]["input_ids"][:64]}], trained), "all")  # warms up
                    found = []
                    for number, batch in enumerate(batches):
                        found.append(one_round(model, batch, KINDS[number % 2 :] + KINDS[: number % 2]))
                        bar.advance(task)
                    runs.append({"model": name, "data": data, "trained": trained, **summed_up(found)})
            del model
            gc.collect()
    memory = [
        {"labelled": labels, "logits": logits, **in_a_process(labels, logits, folder, files)}
        for labels, kinds in MEMORY
        for logits in kinds
    ]
    sizes = {
        "batch_size": batch_size,
        "max_length": max_length,
        "memory_tokens": TOKENS,
        "memory_vocabulary": VOCABULARY,
    }
    save("labelled", {**sizes, "runs": runs, "memory": memory}, picture(runs, memory))
    write_readme(runs, memory)


def examples_from(file: Path, tokenizer: Any, *, count: int, max_length: int) -> list[dict[str, list[int]]]:
    """Draws examples in random order, with labels that are ignored in the prompt."""
    pairs = list(zip(read_texts(file), read_texts(file, ("prompt",))))
    texts, prompts = zip(*shuffled(pairs, count=count, seed=0))
    ids = tokenise(list(texts), tokenizer, max_length=max_length)
    ends = [len(each) for each in tokenizer([f"{prompt}\n" for prompt in prompts])["input_ids"]]
    labels = [[IGNORED_LABEL] * min(end, len(each)) + each[end:] for each, end in zip(ids, ends)]
    return [{"input_ids": each, "labels": own} for each, own in zip(ids, labels)]


def batch_of(examples: list[dict[str, list[int]]], trained: str) -> dict[str, Any]:
    """Makes a row of examples, with labels of their completions or of everything."""
    chosen = examples if trained == "completions" else [{"input_ids": each["input_ids"]} for each in examples]
    return DataCollatorWithFlattening(return_flash_attn_kwargs=True)(chosen)


def one_round(model: Any, batch: dict[str, Any], order: tuple[str, ...]) -> dict[str, Any]:
    """Returns the CPU seconds of a step of each kind on one batch, and how many of its tokens predict a label."""
    labelled = len(batch["labelled_rows"].rows) / batch["labels"].numel()
    return {"labelled": labelled, "seconds": {kind: seconds_of(model, batch, kind) for kind in order}}


def seconds_of(model: Any, batch: dict[str, Any], logits: str) -> float:
    """Returns the CPU seconds of a forward and backward in train mode; the gradients are dropped."""
    model.train()
    with applied(model, verify=False, logits=logits):
        start = time.process_time()
        model(**batch, use_cache=False).loss.backward()
        taken = time.process_time() - start
    model.zero_grad(set_to_none=True)
    return taken


def summed_up(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    speedup = median_of(each["seconds"]["all"] / each["seconds"]["labelled"] for each in rounds)
    return {"rounds": rounds, "speedup": speedup, "labelled": median_of(each["labelled"] for each in rounds)}


def in_a_process(labels: str, logits: str, folder: str, files: tuple[Path, ...]) -> dict[str, Any]:
    """Measures a step in a new process: what it adds in memory, and its CPU seconds."""
    options = ["--model", folder, "--data", str(files[0]), "--here", labels, logits]
    output = subprocess.run([sys.executable, __file__, *options], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(output.stdout.splitlines()[-1])
    return found


def memory_of_a_step(labels: str, logits: str) -> dict[str, Any]:
    """Returns what a step adds to what the process held, in bytes, and its CPU seconds."""
    torch.manual_seed(0)
    model = small_model(layers=1, vocabulary=VOCABULARY)
    ids = torch.randint(3, VOCABULARY, (TOKENS // LENGTH, LENGTH)).tolist()
    ignored = LENGTH // 2 if labels == "half" else 0
    batch = batch_of([{"input_ids": e, "labels": [IGNORED_LABEL] * ignored + e[ignored:]} for e in ids], "completions")
    with applied(model, verify=False):
        model(**batch_of([{"input_ids": ids[0][:8]}], "everything")).loss.backward()  # loads what any step needs
    model.zero_grad(set_to_none=True)
    gc.collect()
    before = resident_bytes()
    reset_peak()
    seconds = seconds_of(model, batch, logits)
    return {"bytes": peak_bytes() - before, "seconds": seconds}


def write_readme(runs: list[dict[str, Any]], memory: list[dict[str, Any]]) -> None:
    """Writes the README's table: steps whose prompts have no labels, and what chunks save of the memory."""
    lines = ["| model | data | tokens that predict a label | speed-up over padding-free |", "|---|---|---|---|"]
    for run in runs:
        if run["trained"] == "completions":
            cells = (
                run["model"],
                run["data"],
                f"{run['labelled']['median']:.0%}",
                f"**{run['speedup']['median']:.2f} x**",
            )
            lines.append(f"| {' | '.join(cells)} |")
    added = {(each["labelled"], each["logits"]): each["bytes"] for each in memory}
    half, chunked = (added[at] / added[at[0], "all"] - 1 for at in (("half", "labelled"), ("everything", "chunked")))
    lines += [
        "",
        f"Memory that a step of one layer adds: {half:+.0%} with half of the tokens labelled, {chunked:+.0%} in",
    ]
    lines.append("chunks with all of them.")
    text = README.read_text()
    begin, end = text.index("<!-- labelled:begin"), text.index("<!-- labelled:end")
    README.write_text(text[: text.index("-->", begin) + 3] + "\n" + "\n".join(lines) + "\n" + text[end:])
    print(f"wrote the table in {README}")


def picture(runs: list[dict[str, Any]], memory: list[dict[str, Any]]) -> Figure:
    """Draws the speed-ups, and what a step adds in memory."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    speed, peak = figure.subplots(1, 2, width_ratios=(3, 2))
    shown = [run for run in runs if run["trained"] == "completions"]
    speed.bar(range(len(shown)), [run["speedup"]["median"] for run in shown], 0.5, color=COLOURS["labelled"])
    names = [f"{run['model']}\n{run['data']}\n{run['labelled']['median']:.0%} labelled" for run in shown]
    speed.set_xticks(range(len(shown)), names, fontsize=7)
    speed.axhline(1, color=COLOURS["all"], linewidth=1)
    speed.set_title(f'speed-up of a {NAMES["packed"]} step, logits="labelled"')
    colours = [COLOURS[each["logits"]] for each in memory]
    peak.bar(range(len(memory)), [each["bytes"] / 2**30 for each in memory], 0.6, color=colours)
    names = [f"{each['logits']}\n{each['labelled']}\nlabelled" for each in memory]
    peak.set_xticks(range(len(memory)), names, fontsize=7)
    peak.set_title("GiB that a step of 1 layer adds")
    return figure


if __name__ == "__main__":
    main()
