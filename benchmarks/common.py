"""What the benchmarks share: where results go, what they ran on, which text, and how their pictures look."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from matplotlib.figure import Figure
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from padfree_patch import versions
from padfree_patch.measure.step import step_batches
from padfree_patch.measure.texts import read_texts, shuffled, tokenise

RESULTS = Path(__file__).parents[1] / "docs" / "benchmarks"
COLOURS = {"padded": "#b0b7c3", "packed": "#1f6feb", "native": "#e08600", "ceiling": "#2da44e"}
NAMES = {"padded": "padded", "packed": "padding-free", "native": "native packed", "ceiling": "ceiling"}
REAL, SMALL = "SmolLM2-135M", "4 layers"
LARGEST_PADDED = {REAL: 8192, SMALL: 32768}
"""Tokens of the largest padded batch that fits into 24 GB with everything that the backward needs."""

matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10})


def environment() -> dict[str, Any]:
    """Returns what a figure depends on besides the code."""
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "padfree_patch": str(versions.installed("padfree_patch")),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def save(name: str, results: dict[str, Any], figure: Figure) -> None:
    """Writes docs/benchmarks/NAME.json and NAME.png."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment(), **results}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    figure.savefig(RESULTS / f"{name}.png", dpi=130)
    print(f"wrote {RESULTS / name}.json and .png")


def legend_above(figure: Figure) -> None:
    """Puts the legend of the first panel above all panels, where it covers nothing that is drawn."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)


def progress() -> Progress:
    """Makes a bar that shows what runs now."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns)


def small_model(*, layers: int = 4, vocabulary: int = 8192, **changes: Any) -> Any:
    """Makes a Llama with random weights, as wide as SmolLM2-135M, whose head does not dwarf the layers."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = transformers.LlamaConfig(
        **{**sizes, **changes},
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def load(folder: str, name: str) -> Any:
    """Loads the real weights, or makes four layers of the same width with random weights and a smaller vocabulary."""
    if name == SMALL:
        return small_model()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")


def fold(model: Any, examples: list[torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Makes step batches with token ids that the model has."""
    return step_batches([ids % model.config.vocab_size for ids in examples])


def batches_from(file: Path, tokenizer: Any, *, batch_size: int, count: int, max_length: int) -> Iterator[list[Any]]:
    """Yields `count` batches of examples in random order: int64 (tokens,) each, cut to `max_length`."""
    texts = shuffled(read_texts(file), count=batch_size * count, seed=batch_size)
    examples = [torch.tensor(ids) for ids in tokenise(texts, tokenizer, max_length=max_length)]
    for start in range(0, len(examples), batch_size):
        yield examples[start : start + batch_size]


def median_of(ratios: Iterable[float]) -> dict[str, float]:
    """Returns median, smallest, largest and count."""
    ratios = list(ratios)
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "count": len(ratios)}
