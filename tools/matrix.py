"""Runs every check on every variant of every patch in this environment, and writes the verdicts as JSON.

python tools/matrix.py OUTPUT.json         one version's verdicts; with --natively, also whether upstream needs no patch
                                           with --quick, variants run the checks in QUICK only; with --defaults,
                                           default configurations run these, and variants none;
                                           with --only=A,B, the patches of these model types
python tools/matrix.py --merge FOLDER      all of them into docs/support.json, docs/support.md and the package's table
python tools/matrix.py --compare FOLDER    fails if they are not what docs/support.json says
python tools/matrix.py --breadth FOLDER    what tools/breadth.py wrote, into docs/breadth.json and docs/support.md
python tools/matrix.py --ways FOLDER       what tools/upstream_ways.py wrote, into docs/upstream.json and both pages
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import breadth_page
import upstream_ways_page
from helpers import flash_attention_here
from padfree_patch import PadfreeError, patching, versions
from padfree_patch.patching import support
from padfree_patch.registry import Patch, found_by_check, patch_for, registry
from padfree_patch.testing import CHECKS, Unavailable, UpstreamFails, checks, conformance, tiny_model
from padfree_patch.testing.stored import Stored

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "support.md"
CELLS = PAGE.with_suffix(".json")
TABLE = ROOT / "padfree_patch" / "patching" / support.FILE.name
"""In the repository, which need not be where this package was installed from."""

NATIVELY = "--natively" in sys.argv
"""Whether to run the unpatched model too. --compare takes exact and native-exact for one."""

ONLY = [each for option in sys.argv if option.startswith("--only=") for each in option[7:].split(",")]
"""Model types of new patches. The table keeps what it says of all others."""

QUICK = (conformance.check_gradients, conformance.check_rows)
"""Checks of what an architecture's variants may differ in; a third of the time of all checks."""
GAP = ": but upstream fails "

Check = Callable[..., None]
Cells = dict[str, dict[str, dict[str, dict[str, str]]]]
"""version -> model type -> implementation -> variant -> verdict."""


def verdicts() -> dict[str, dict[str, dict[str, str]]]:
    """Returns model type -> implementation -> variant -> verdict."""
    return {each.model_type: verdicts_of(each) for each in registry().patches() if not ONLY or each.model_type in ONLY}


def verdicts_of(patch: Patch) -> dict[str, dict[str, str]]:
    gc.collect()
    gc.freeze()  # what was imported so far: apply and restore collect garbage, which takes as long as there are objects
    variants = {} if "--defaults" in sys.argv else patch.variants
    of_variants = QUICK if "--quick" in sys.argv else CHECKS
    of_default = QUICK if "--defaults" in sys.argv else CHECKS
    return {
        implementation: {
            "default": verdict(patch, implementation, {}, of_default),
            **{variant: verdict(patch, implementation, config, of_variants) for variant, config in variants.items()},
        }
        for implementation in patching.IMPLEMENTATIONS
    }


def verdict(patch: Patch, implementation: str, config: dict[str, Any], checks_to_run: Sequence[Check]) -> str:
    # On flash-attn, 4.34 casts float32 to float16 for good, and Phi of 4.36 asks a projection that it has not for its
    # dtype; float64 they leave alone.
    double = implementation == "flash_attention_2" and versions.inside(versions.transformers_version(), "<4.37")
    torch.set_default_dtype(torch.float64 if double else torch.float32)

    try:
        model = tiny_model(patch, implementation, **config)
    except UpstreamFails as error:
        return f"upstream fails: {first_line(error)}"
    except Unavailable as reason:
        return f"absent: {first_line(reason)}"
    make = Stored(model)  # never run: rotaries remember what they have seen
    if failure := failure_of(lambda: model(input_ids=torch.arange(3, 9).unsqueeze(0))):
        return f"upstream fails: {failure}"
    try:
        with applied_once(model):
            pass
    except PadfreeError as error:
        return f"refused: {first_line(error)}"
    chosen = [*checks_to_run]
    balanced = hasattr(
        sys.modules[type(model).__module__], "load_balancing_loss_func"
    )  # Llama 4 has router logits only
    chosen += [conformance.check_router_losses] if balanced and hasattr(model.config, "output_router_logits") else []
    gaps = {}
    for check in chosen:
        if failure := failure_of(lambda c=check: c(make)):
            # Upstream, unpatched, fails in the same way: its error is not ours.
            if failure_of(lambda c=check: c(make, patched=False)) != failure or "AssertionError" in failure:
                return f"wrong: {check.__name__}: {failure}"
            gaps[check] = f"{check.__name__}: {failure}"
    if conformance.check_logits in gaps:
        return f"upstream fails: {gaps[conformance.check_logits]}"
    if failure := failure_of(lambda: patching.apply(make())):
        return f"wrong: verify: {failure}"
    done = [check for check in chosen if check not in gaps]
    natively = NATIVELY and all(failure_of(lambda c=check: c(make, patched=False)) is None for check in done)
    return ("native-exact" if natively else "exact") + "".join(f"{GAP}{gap}" for gap in gaps.values())


def applied_once(model: Any) -> Any:
    """Applies without a check where the patch says all, since `verdict` verifies each model once."""
    return patching.applied(model, verify=found_by_check(patch_for(model)))


def failure_of(run: Callable[[], Any]) -> str | None:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:160]


def merge(folder: Path) -> None:
    """Puts every FOLDER/VERSION.json into the table; what is not there keeps what the table says of it."""
    found: Cells = json.loads(CELLS.read_text()) if CELLS.exists() else {}
    for version, row in read(folder).items():
        found[version] = {**found.get(version, {}), **row}
    found = {version: found[version] for version in sorted(found, key=by_release)}
    CELLS.write_text(json.dumps(found, indent=1) + "\n")
    words = {
        version: {
            model_type: {implementation: summary(variants) for implementation, variants in implementations.items()}
            for model_type, implementations in row.items()
        }
        for version, row in found.items()
    }
    TABLE.write_text(json.dumps(words, indent=0) + "\n")
    draw()


def draw() -> None:
    """Writes docs/support.md from the two tables."""
    PAGE.write_text(page(json.loads(CELLS.read_text()), breadth_page.section(breadth_page.read())))


def compare(folder: Path) -> None:
    """Exits with the cells of FOLDER that are not what the table in the repository says."""
    table = json.loads(CELLS.read_text())
    changed = [
        f"{version} {model_type} {implementation} {variant}: {said!r}, in docs/support.json {known!r}"
        for version, row in read(folder).items()
        for model_type, implementations in row.items()
        for implementation, variants in implementations.items()
        for variant, said in variants.items()
        if said not in forms_of(known := table[version][model_type].get(implementation, {}).get(variant, ""))
    ]
    if changed:
        sys.exit("\n".join(changed))


def forms_of(known: str) -> tuple[str, str]:
    """Returns what a run without --natively says of a cell, and what it says with the QUICK checks only.

    >>> forms_of("native-exact: but upstream fails check_cost: TypeError: but upstream fails check_rows: ValueError")[1]
    'exact: but upstream fails check_rows: ValueError'
    """
    known = known.removeprefix("native-")
    word, *gaps = known.split(GAP)
    quick = {each.__name__ for each in QUICK} | {conformance.check_router_losses.__name__}
    return known, GAP.join([word, *(gap for gap in gaps if gap.split(":")[0] in quick)])


def read(folder: Path) -> Cells:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def by_release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def summary(variants: dict[str, str]) -> str:
    """Returns the worst verdict; a variant that upstream can't build or run does not count against the others."""
    words = {said.split(":")[0] for said in variants.values()}
    return next(
        (word for word in ("wrong", "refused", "exact", "native-exact", "upstream fails") if word in words), "absent"
    )


def page(found: Cells, by_name: Sequence[str]) -> str:
    """Returns the text of docs/support.md, with the lines of the part about any decoder by name."""
    model_types = sorted({model_type for row in found.values() for model_type in row})
    cells = [
        (version, model_type, implementation, variant, said)
        for version, row in found.items()
        for model_type, implementations in row.items()
        for implementation, variants in implementations.items()
        for variant, said in variants.items()
    ]
    counts = Counter(said.split(":")[0] for *_, said in cells)
    by_itself = upstream_ways_page.read()
    lines = [
        "# Support",
        "",
        *by_name,
        "## Registered architectures",
        "",
        "`nox -s matrix` makes this part, and [support.json](support.json) for programs. A cell is an architecture in"
        " one of its configurations, loaded with one attention implementation, on the last patch release of a "
        "transformers minor. In each cell, all checks of `padfree_patch.testing` run: logits, loss and gradients "
        "against each example alone, isolation bit for bit, several rows, two forwards before one backward with both "
        "kinds of checkpointing, device syncs, the largest tensor, router losses of mixtures of experts, and ordinary"
        " calls, which must be bit-identical. What else models do was measured by "
        "[transformers' own tests](upstream-tests.md).",
        "",
        "- **exact**: all checks pass on the patched model, not all on the unpatched one.",
        "- **native-exact**: the unpatched model passes them too.",
        "- **upstream fails**: transformers itself cannot run the unpatched model. The list below says why, and where "
        "upstream fails in one of the checks only.",
        "- **refused**: `apply` refuses the model, with the reason. **wrong**: a check fails.",
        "- empty: transformers has no such model in that version or with that implementation. **not run**: a newer "
        "patch, on a version between the ends of an era; `nox -s matrix` without names tries it there.",
        "- **upstream, ...**: how many architectures, in their default configuration, give each example's own logits "
        "unpatched, in two ways of calling; [upstream.md](upstream.md) has the others. None is native-exact, since the "
        "checks call `model(**batch)` too, and count the tokens x tokens masks that upstream builds.",
        "",
        "flash_attention_2 ran on the CPU: transformers' own code around a stand-in for the flash-attn package, which "
        "computes in plain PyTorch (`tests/helpers/stand_ins`). `nox -s flash_attn` runs the real package.",
        "",
        f"{len(cells) - counts['absent']} cells on {len(found)} versions: "
        + ", ".join(
            f"{counts[word]} {word}" for word in ("exact", "native-exact", "wrong", "refused", "upstream fails")
        )
        + f". In {counts['absent']} more transformers has no such model.",
    ]
    for implementation in patching.IMPLEMENTATIONS:
        lines += [
            "",
            f"### {implementation}",
            "",
            f"| | {' | '.join([*upstream_ways_page.HEADINGS.values(), *model_types])} |",
            "|---" * (len(model_types) + len(upstream_ways_page.HEADINGS) + 1) + "|",
        ]
        for version, row in found.items():
            words = [summary(row[each].get(implementation, {})) if each in row else "not run" for each in model_types]
            alone = [
                upstream_ways_page.column(by_itself, version, implementation, way)
                for way in upstream_ways_page.HEADINGS
            ]
            lines.append(f"| {version} | {' | '.join([*alone, *(word.replace('absent', '') for word in words)])} |")
    inexact: dict[tuple[str, ...], list[str]] = {}
    for version, *cell, said in cells:
        if said not in ("exact", "native-exact") and not said.startswith("absent"):
            inexact.setdefault((*cell, said), []).append(version)
    lines += ["", "### What is not exact", ""]
    for (model_type, implementation, variant, said), where in sorted(inexact.items()):
        lines.append(f"- {model_type}, {variant}, {implementation}, on {', '.join(where)}: {said}")
    return "\n".join(lines) + "\n"


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    checks.applied = applied_once
    result = verdicts()
    Path(sys.argv[1]).write_text(json.dumps(result))
    counts = Counter(said.split(":")[0] for each in result.values() for row in each.values() for said in row.values())
    print(f"transformers {versions.transformers_version()}: {dict(counts)}")
    sys.exit(1 if counts["wrong"] or counts["refused"] else 0)


if __name__ == "__main__":
    if sys.argv[1] == "--merge":
        merge(Path(sys.argv[2]))
    elif sys.argv[1] == "--compare":
        compare(Path(sys.argv[2]))
    elif sys.argv[1] == "--breadth":
        breadth_page.merge(Path(sys.argv[2]))
        draw()
    elif sys.argv[1] == "--ways":
        upstream_ways_page.merge(Path(sys.argv[2]))
        draw()
    else:
        flash_attention_here.pretend()
        main()
