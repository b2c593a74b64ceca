"""What the patch costs where it has nothing to do, and what apply and verify take.

    .venv/bin/nox -s benchmark -- overhead

Ordinary calls: the wrapper's own time is the difference between a patched and an unpatched forward of a model so narrow
that little else is in it (4 layers, width 18), over the time of the same forward at SmolLM2-135M's width. Both forwards
of the wide model are timed as well, one after the other; their difference drowns in noise. Operators and syncs are
counted, and counts do not wobble.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import torch
from common import progress, save, small_model
from matplotlib.figure import Figure
from torch.utils._python_dispatch import TorchDispatchMode

import padfree_patch
from padfree_patch import DataCollatorWithFlattening, applied
from padfree_patch.testing import SyncCounter

NARROW = {"hidden_size": 18, "intermediate_size": 32, "num_attention_heads": 9, "num_key_value_heads": 3}


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += 1
        return func(*args, **(kwargs or {}))


@click.command()
@click.option("--rounds", default=200, show_default=True, help="Forwards of each kind.")
def main(rounds: int) -> None:
    """Time, count and write."""
    torch.manual_seed(0)
    wide, narrow, deep = small_model(), small_model(**NARROW, vocabulary=64), small_model(**NARROW, layers=32)
    calls = {
        "without a mask": {"input_ids": torch.randint(64, (4, 128)), "use_cache": False},
        "padded, with a mask": {"input_ids": torch.randint(64, (4, 128)), "use_cache": False},
    }
    calls["padded, with a mask"]["attention_mask"] = torch.ones(4, 128, dtype=torch.long).index_fill_(
        1, torch.arange(100, 128), 0
    )
    results: dict[str, Any] = {"calls": {}}
    with progress() as bar:
        task = bar.add_task("ordinary calls", total=len(calls) + 2)
        for name, batch in calls.items():
            on_narrow, on_wide = compared(narrow, batch, rounds), compared(wide, batch, max(rounds // 5, 2))
            added = on_narrow["patched"] - on_narrow["unpatched"]
            results["calls"][name] = {
                "added_seconds": added,
                "wide_seconds": on_wide["unpatched"],
                "added_share": added / on_wide["unpatched"],
                "wide_ratio": on_wide["patched"] / on_wide["unpatched"],
                "counts": counted(wide, batch),
            }
            bar.advance(task)
        bar.update(task, description="apply and verify")
        results["apply_32_layers_seconds"] = repeated(lambda: padfree_patch.apply(deep, verify=False), deep, 9)
        padfree_patch.apply(wide, verify=False)
        results["verify_4_layers_seconds"] = statistics.median(
            timed(lambda: padfree_patch.verify(wide)) for _ in range(5)
        )
        padfree_patch.restore(wide)
        bar.advance(task)
        bar.update(task, description="syncs")
        results["syncs_per_step"] = syncs(wide)
        bar.advance(task)
    save("overhead", results, picture(results))


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def repeated(run: Callable[[], Any], model: Any, times: int) -> float:
    """Returns the median seconds of an apply; each is undone before the next."""
    seconds = []
    for _ in range(times):
        seconds.append(timed(run))
        padfree_patch.restore(model)
    return statistics.median(seconds)


@torch.no_grad()
def compared(model: Any, batch: dict[str, Any], rounds: int) -> dict[str, float]:
    """Returns the median seconds of a forward, patched and unpatched in turn."""
    seconds: dict[str, list[float]] = {"unpatched": [], "patched": []}
    for number in range(rounds + 1):
        unpatched = timed(lambda: model(**batch))
        with applied(model, verify=False):
            patched = timed(lambda: model(**batch))
        if number:
            seconds["unpatched"].append(unpatched)
            seconds["patched"].append(patched)
    return {name: statistics.median(times) for name, times in seconds.items()}


@torch.no_grad()
def counted(model: Any, batch: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Counts operators and device syncs of one forward, unpatched and patched."""
    found = {}
    for name in ("unpatched", "patched"):
        if name == "patched":
            padfree_patch.apply(model, verify=False)
        with OperatorCounter() as operators:
            model(**batch)
        with SyncCounter() as of_syncs:
            model(**batch)
        found[name] = {"operators": operators.total, "syncs": of_syncs.total}
    padfree_patch.restore(model)
    return found


def syncs(model: Any) -> dict[str, int]:
    """Counts the device syncs of a packed step's forward and backward."""
    examples = [{"input_ids": torch.randint(64, (n,)).tolist()} for n in (50, 7, 120)]
    found = {}
    for name, with_lengths in (("with the collator's lengths", True), ("from position_ids", False)):
        batch = DataCollatorWithFlattening(return_flash_attn_kwargs=with_lengths)(examples)
        with applied(model, verify=False), SyncCounter() as of_syncs:
            model(**batch).loss.backward()
        found[name] = of_syncs.total
    model.zero_grad(set_to_none=True)
    return found


def picture(results: dict[str, Any]) -> Figure:
    """Draws the added share of a forward, and the seconds of apply and verify, each beside its bar."""
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    calls, once = figure.subplots(1, 2)
    shares = {name: 100 * each["added_share"] for name, each in results["calls"].items()}
    drawn = calls.barh(list(shares), list(shares.values()), color="#1f6feb")
    calls.bar_label(drawn, fmt="%.2f %%", padding=3)
    calls.axvline(1, color="#b0b7c3", linestyle="--")
    calls.set_title("time added to an ordinary forward of 4 layers")
    times = {
        "apply, 32 layers": 1e3 * results["apply_32_layers_seconds"],
        "verify, 4 layers": 1e3 * results["verify_4_layers_seconds"],
    }
    once.bar_label(once.barh(list(times), list(times.values()), color="#1f6feb"), fmt="%.0f ms", padding=3)
    once.set_title("milliseconds, once")
    for axes in figure.axes:
        axes.margins(x=0.25)
    return figure


if __name__ == "__main__":
    main()
