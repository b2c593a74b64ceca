"""Writes docs/benchmarks.md from the results in docs/benchmarks/ and the text in page.md.

.venv/bin/nox -s benchmark -- report
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from gpu_tables import gpu_values
from tables import spread, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "benchmarks"
PAGE = ROOT / "docs" / "benchmarks.md"
TEXT = Path(__file__).with_name("page.md")
PARTS = ("linear layers", "head and loss", "attention", "the rest")


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())
    print(f"wrote {PAGE}")


def page() -> str:
    """Returns the text with the tables and figures in their places."""
    names = ("step", "memory", "attention", "scaling", "convergence", "overhead", "packing", "per_sequence", "gpu")
    step, memory, attention, scaling, convergence, overhead, packing, per_sequence, gpu = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in names
    )
    fits = scaling["fits"]
    labelled = json.loads((RESULTS / "labelled.json").read_text())
    return TEXT.read_text().format(
        **{name: step["environment"][name] for name in ("threads", "cpu", "torch", "transformers")},
        step=step_table(step["ratios"]),
        waited=f"{max(each['waited_share'] for each in step['ratios']):.0%}",
        profile=table(
            ("model", *PARTS),
            ((name, *(f"{of.get(part, 0):.0%}" for part in PARTS)) for name, of in step["profiles"].items()),
        ),
        bound_small=f"{bound(step, '4 layers'):.3f}",
        bound_real=f"{bound(step, 'SmolLM2-135M'):.3f}",
        memory=memory_table(memory["found"]),
        attention=attention_table(attention["speeds"]),
        errors=table(
            ("dtype", "", "output", "gradients"),
            ((e["dtype"], e["name"], f"{e['output']:.1e}", f"{e['gradients']:.1e}") for e in attention["errors"]),
        ),
        **options_values(json.loads((RESULTS / "attention_options.json").read_text())["found"]),
        **convergence_values(convergence),
        row_length=f"{packing['max_length']:,}",
        packing=packing_table(packing["rows"]),
        million_plan=f"{packing['million']['plan_seconds']:.1f}",
        million_waste=f"{packing['million']['waste']:.2%}",
        million_sampler=f"{packing['million']['sampler_seconds']:.1f}",
        length=scaling["length"],
        per_token=f"{1e3 * fits['packed']['per_token']:.3f}",
        r_squared=f"{fits['packed']['r_squared']:.4f}",
        exponent=f"{fits['packed']['exponent']:.2f}",
        ceiling_exponent=f"{fits['ceiling']['exponent']:.2f}",
        native_exponent=f"{fits['native']['exponent']:.2f}",
        scaling=scaling_table(scaling["rows"]),
        overhead=overhead_table(overhead["calls"]),
        apply=f"{1e3 * overhead['apply_32_layers_seconds']:.1f}",
        verify=f"{1e3 * overhead['verify_4_layers_seconds']:.0f}",
        per_sequence=per_sequence_table(per_sequence["models"]),
        **gpu_values(gpu),
        **shared_values(json.loads((RESULTS / "shared_prompts.json").read_text())),
        **labelled_values(labelled),
        **compiled_values(json.loads((RESULTS / "compiled.json").read_text())),
        syncs=", ".join(f"{count} {name}" for name, count in overhead["syncs_per_step"].items()),
    )


def step_table(ratios: list[dict[str, Any]]) -> str:
    columns = (
        "model",
        "data",
        "batch",
        "padding-free over the ceiling",
        "attention work",
        "over padded",
        "of what is possible",
        "over native",
        "real tokens/s",
        "padded batches timed",
    )
    rows = []
    for each in ratios:
        padded = each.get("packed_over_padded")
        rows.append(
            (
                *(each[name] for name in ("model", "data", "batch_size")),
                f"**{spread(each['packed_over_ceiling'])}**",
                f"{each['attention_work_over_ceiling']['median']:.1f} x",
                spread(padded),
                spread(each.get("share_of_possible")),
                spread(each["packed_over_native"]),
                f"{each['real_tokens_per_second']['packed']['median']:.0f}",
                f"{padded['count'] if padded else 0} of {each['packed_over_ceiling']['count']}",
            )
        )
    return table(columns, rows)


def bound(step: dict[str, Any], model: str) -> float:
    """Returns the share of the ceiling's speed, at batch 8 on flan_style, if attention cost the same per score."""
    (ratios,) = (
        each
        for each in step["ratios"]
        if (each["model"], each["data"], each["batch_size"]) == (model, "flan_style_20k", 8)
    )
    return 1 - step["profiles"][model]["attention"] * (1 - 1 / ratios["attention_work_over_ceiling"]["median"])


def memory_table(found: list[dict[str, Any]]) -> str:
    rows = []
    for model, data in dict.fromkeys((each["model"], each["data"]) for each in found):
        of_kinds = [
            [each for each in found if (each["model"], each["data"], each["kind"]) == (model, data, kind)]
            for kind in ("padded", "packed")
        ]
        growth = [median(each["peak_bytes"] - each["held_bytes"] for each in of_kind) for of_kind in of_kinds]
        peaks = [median(each["peak_bytes"] for each in of_kind) for of_kind in of_kinds]
        in_gib = (f"{peak / 2**30:.2f} GiB" for peak in peaks)
        rows.append((model, data, *in_gib, f"**{peaks[1] / peaks[0] - 1:+.0%}**", f"{growth[1] / growth[0] - 1:+.0%}"))
    return table(("model", "data", "padded", "padding-free", "peak", "growth"), rows)


def attention_table(speeds: list[dict[str, Any]]) -> str:
    names = list(speeds[0]["ratios"])
    rows = []
    for each in speeds:
        cells = (
            spread({"median": each["ratios"][name], "min": each["spread"][name][0], "max": each["spread"][name][1]})
            for name in names[1:]
        )
        rows.append((each["dtype"], each["shape"], each["lengths"], *cells, f"{each['milliseconds']:.0f} ms"))
    return table(("dtype", "shape", "lengths", *names[1:], "the 1.00"), rows)


def packing_table(found: list[dict[str, Any]]) -> str:
    rows = []
    for each in found:
        ways = (f"{each[way]['seconds']:.2f} s, {each[way]['waste']:.2%} waste" for way in ("ours", "trl"))
        rows.append(
            (each["data"], f"{each['examples']:,}", f"**{next(ways)}**", next(ways), f"{each['sampler']['waste']:.2%}")
        )
    return table(("data", "examples", "pack_dataset", "TRL's", "sampler's waste"), rows)


def convergence_values(found: dict[str, Any]) -> dict[str, Any]:
    settings, apart, runs = found["settings"], found["largest_difference"], found["runs"]
    rows = []
    for kind, name in (("padded", "padded"), ("packed", "padding-free"), ("control", "control"), ("naive", "naive")):
        run = runs[kind]
        difference = f"{apart[kind]:.1e}" if kind in apart else ""
        rows.append((name, f"{run['losses'][-1]:.6f}", f"**{run['validation_loss']:.6f}**", difference))
    return {
        "convergence": table(
            ("run", "last training loss", "validation loss", "largest difference of a step's loss from padding-free"),
            rows,
        ),
        "run_layers": settings["layers"],
        "run_data": settings["data"],
        "run_steps": settings["steps"],
        "run_batch": settings["batch_size"],
        "run_held_out": settings["held_out"],
        "run_before": f"{settings['validation_before']:.4f}",
        "run_bound": settings["bound"],
        "run_of_control": apart["padded"] / apart["control"],
        "run_naive_of_control": apart["naive"] / apart["control"],
    }


def scaling_table(found: list[dict[str, Any]]) -> str:
    rows = []
    for row in found:
        seconds = row["medians"]
        packed, native = seconds["packed"], seconds.get("native")
        compared = (f"{native:.2f}", f"**{native / packed:.2f} x**") if native else ("not run", "")
        rows.append((f"{row['tokens']:,}", f"{packed:.2f}", f"{seconds['ceiling'] / packed:.2f}", *compared))
    return table(
        ("tokens in the row", "padding-free, s", "over the ceiling", "native, s", "padding-free over native"), rows
    )


def compiled_values(found: dict[str, Any]) -> dict[str, Any]:
    """Returns the table and the figures about torch.compile."""
    rows = [
        (name, f"**{spread(found[of])}**")
        for name, of in (
            ("padding-free, compiled, over padding-free", "compiled_over_as_it_is"),
            ("padding-free, compiled, over padded, compiled", "compiled_over_compiled_padded"),
            ("padding-free over padded", "as_it_is_over_padded"),
        )
    ]
    return {
        "compiled_speeds": table(("step", "speed"), rows),
        "compiled_layers": found["layers"],
        "compiled_batch": found["batch_size"],
        "compiled_operator": f"{found['operator_over_attention']:.2f}",
        "compiled_breaks": found["graph_breaks"],
        "compiled_apart": f"{found['largest_difference_of_loss']:.0e}",
    }


def labelled_values(found: dict[str, Any]) -> dict[str, Any]:
    rows = (
        (run["model"], run["data"], run["trained"], f"{run['labelled']['median']:.0%}", f"**{spread(run['speedup'])}**")
        for run in found["runs"]
    )
    memory = []
    for each in found["memory"]:
        (whole,) = (e for e in found["memory"] if (e["labelled"], e["logits"]) == (each["labelled"], "all"))
        less = f"**{each['bytes'] / whole['bytes'] - 1:+.0%}**" if each is not whole else ""
        speed = f"{whole['seconds'] / each['seconds']:.2f}"
        memory.append((each["labelled"], each["logits"], f"{each['bytes'] / 2**30:.2f} GiB", less, speed))
    return {
        "labelled_steps": table(("model", "data", "labels on", "tokens that predict one", "speed-up"), rows),
        "labelled_memory": table(("labels on", "logits", "a step adds", "", "speed"), memory),
        "labelled_batch": found["batch_size"],
        "labelled_length": f"{found['max_length']:,}",
        "labelled_tokens": f"{found['memory_tokens']:,}",
    }


def overhead_table(calls: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, each in calls.items():
        before, after = each["counts"]["unpatched"], each["counts"]["patched"]
        rows.append(
            (
                name,
                f"{1e6 * each['added_seconds']:.0f} µs",
                f"**{each['added_share']:.2%}**",
                *(f"{before[what]} to {after[what]}" for what in ("operators", "syncs")),
            )
        )
    return table(("ordinary call", "added", "of the forward", "operators", "syncs"), rows)


def options_values(found: list[dict[str, Any]]) -> dict[str, str]:
    names = list(found[0]["ratios"])
    rows = ((*(e[n] for n in ("dtype", "shape", "lengths")), *(spread(e["ratios"][n]) for n in names)) for e in found)
    slowest = [
        f"{dtype} "
        + ", ".join(
            f"{max(e['ratios'][name]['median'] for e in found if e['dtype'] == dtype):.2f} for {name}"
            for name in names[:3]
        )
        for dtype in dict.fromkeys(each["dtype"] for each in found)
    ]
    return {
        "options": table(("dtype", "shape", "lengths", *names), rows),
        "slowest_options": "; ".join(slowest),
    }


def per_sequence_table(models: list[dict[str, Any]]) -> str:
    kinds = ("padded", "one by one", "row")
    rows = ((each["model_type"], each["way"], *(spread(each["ratios"][kind]) for kind in kinds)) for each in models)
    return table(("model type", "way", "over padded", "over one by one", "over the row that mixes"), rows)


def shared_values(found: dict[str, Any]) -> dict[str, Any]:
    rows = (
        (
            each["group"],
            f"{each['prompt'] // found['completion']}:1",
            " to ".join(f"{tokens:,}" for tokens in each["tokens"].values()),
            f"{each['ratio_of_tokens']:.2f}",
            f"**{each['speedup']['median']:.2f} x** ({each['speedup']['min']:.2f}-{each['speedup']['max']:.2f})",
        )
        for each in found["shapes"]
    )
    return {
        "shared_prompts": table(
            ("examples on each prompt", "prompt : completion", "tokens of a row", "ratio of tokens", "speed-up"), rows
        ),
        "shared_apart": f"{max(each['largest_difference_of_loss'] for each in found['shapes']):.0e}",
        **{f"shared_{name}": found[name] for name in ("completion", "examples", "layers")},
    }


if __name__ == "__main__":
    main()
