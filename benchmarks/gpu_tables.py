"""The part of docs/benchmarks.md about a GPU."""

from __future__ import annotations

from statistics import median
from typing import Any

from tables import spread_of, table


def gpu_values(found: dict[str, Any]) -> dict[str, Any]:
    kinds = sorted(found["steps"][0]["rounds"][0]["found"], key=lambda kind: kind.split(", ")[::-1])
    sizes = [f"{run['width']}, batch {run['batch_size']}" for run in found["steps"]]
    largest = max(found["steps"], key=lambda run: (run["width"], run["batch_size"]))
    rows = [
        (
            kind.replace("packed", "**padding-free**"),
            *(spread_of([1e3 * each["found"][kind]["seconds"] for each in run["rounds"]]) for run in found["steps"]),
            f"{median(each['found'][kind]['peak_bytes'] for each in largest['rounds']) / 2**30:.1f}",
            *largest["counts"][kind].values(),
        )
        for kind in kinds
    ]
    ratios = [each for each in found["exactness"]["models"] if "logits" in each]
    return {
        **{f"gpu_{name}": found["environment"][name] for name in ("card", "torch", "transformers", "cuda")},
        "gpu_layers": largest["layers"],
        "gpu_steps": table(("step, milliseconds", *sizes, "peak GiB", "kernels", "syncs"), rows),
        "gpu_counted": f"{largest['width']}, batch {largest['batch_size']}",
        "gpu_models": ", ".join(dict.fromkeys(each["model"] for each in ratios)),
        "gpu_smallest": f"{min(min(each['logits'], each['gradients']) for each in ratios):.2f}",
        "gpu_largest": f"{max(max(each['logits'], each['gradients']) for each in ratios):.2f}",
        "gpu_found": found_table(found["found"]),
        "gpu_labelled": labelled_table(found["labelled"]),
        "gpu_shared": shared_table(found["shared"]),
        "gpu_attention": gpu_attention_table(found["exactness"]["attention"]),
        "gpu_compiled": table(
            ("backend", "as it is, ms", "compiled, ms", "largest difference of the loss"),
            (
                (
                    each["backend"],
                    *(f"{1e3 * each[name]:.1f}" for name in ("seconds", "compiled_seconds")),
                    f"{each['largest_difference_of_loss']:.1e}",
                )
                for each in found["compiled"]
            ),
        ),
    }


def gpu_attention_table(found: list[dict[str, Any]]) -> str:
    rows = []
    for each in found:
        errors = (
            (f"{each[name]:.1e}" for name in ("output", "gradients")) if "output" in each else (each["refused"], "")
        )
        rows.append((each["dtype"], each["option"] or "none", each["backend"], *errors))
    return table(("dtype", "option", "backend", "output", "gradients"), rows)


def found_table(found: list[dict[str, Any]]) -> str:
    kinds = ("packed", "padded", "row", "one by one")
    rows = (
        (
            each["model"],
            each["way"],
            f"{each['loss']:.0e}",
            f"{each['gradients']:.0e}",
            *(spread_of([1e3 * seconds for seconds in each["seconds"][kind]]) for kind in kinds),
            " / ".join(str(each["counts"][kind]["syncs"]) for kind in kinds),
        )
        for each in found
    )
    columns = ("model type", "way", "loss off by", "gradients off by", "padding-free, ms")
    return table((*columns, "padded", "row that mixes", "one by one", "syncs of each"), rows)


def labelled_table(found: list[dict[str, Any]]) -> str:
    rows = (
        (
            each["labelled"],
            kind,
            spread_of([1e3 * run[kind]["seconds"] for run in each["rounds"]]),
            f"{median(run['all']['seconds'] / run[kind]['seconds'] for run in each['rounds']):.2f}",
            f"{median(run[kind]['peak_bytes'] for run in each['rounds']) / 2**30:.1f}",
            each["counts"][kind]["syncs"],
        )
        for each in found
        for kind in each["rounds"][0]
    )
    return table(("has a label", "logits", "milliseconds", "times as fast as all", "peak GiB", "syncs"), rows)


def shared_table(found: list[dict[str, Any]]) -> str:
    rows = (
        (
            each["group"],
            f"{each['ratio']}:1",
            f"{each['tokens']['whole'] / each['tokens']['shared']:.2f}",
            f"{median(run['whole']['seconds'] / run['shared']['seconds'] for run in each['rounds']):.2f}",
            f"{median(run['whole']['peak_bytes'] / run['shared']['peak_bytes'] for run in each['rounds']):.2f}",
            each["counts"]["shared"]["syncs"],
            f"{each['apart']:.0e}",
        )
        for each in found
    )
    columns = (
        "completions on a prompt",
        "prompt to completion",
        "tokens",
        "speed",
        "memory",
        "syncs",
        "losses differ by",
    )
    return table(columns, rows)
