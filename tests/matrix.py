"""Runs every check on every variant of every patch in this environment, and writes the verdicts as JSON.

python tests/matrix.py OUTPUT.json         one version's verdicts
python tests/matrix.py --merge FOLDER      all of them into padfree_patch/support.json and docs/support.md
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from padfree_patch import PadfreeError, patching, support, versions
from padfree_patch.registry import Patch, registry
from padfree_patch.testing import CHECKS, Unavailable, tiny_model

ROOT = Path(__file__).parents[1]


def verdicts() -> dict[str, dict[str, dict[str, str]]]:
    """model type -> implementation -> variant -> verdict."""
    return {
        patch.model_type: {
            implementation: {
                variant: verdict(patch, implementation, patch.variants.get(variant, {}))
                for variant in ("default", *patch.variants)
            }
            for implementation in ("eager", "sdpa")
        }
        for patch in registry().patches()
    }


def verdict(patch: Patch, implementation: str, config: dict[str, Any]) -> str:
    def make() -> Any:
        return tiny_model(patch, implementation, **config)

    try:
        model = make()
    except Unavailable as reason:
        return f"absent: {first_line(reason)}"
    if failure := failure_of(lambda: model(input_ids=torch.arange(3, 9).unsqueeze(0))):
        return f"upstream fails: {failure}"
    try:
        patching.apply(model, verify=False)
    except PadfreeError as error:
        return f"refused: {first_line(error)}"
    for check in CHECKS:
        if failure := failure_of(lambda c=check: c(make)):
            # Upstream, unpatched, fails on the ordinary calls of some versions; its error there is not ours.
            if failure_of(lambda c=check: c(make, patched=False)) == failure and "AssertionError" not in failure:
                return f"upstream fails: {check.__name__}: {failure}"
            return f"wrong: {check.__name__}: {failure}"
    return "exact"


def failure_of(run: Callable[[], Any]) -> str | None:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:160]


def merge(folder: Path) -> None:
    """Every FOLDER/VERSION.json; the versions that are not there keep what support.json says of them."""
    found = dict(support.cells())
    found.update({path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")})
    support.FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    (ROOT / "docs" / "support.md").write_text(support.page(found))


if __name__ == "__main__":
    if sys.argv[1] == "--merge":
        merge(Path(sys.argv[2]))
    else:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        result = verdicts()
        Path(sys.argv[1]).write_text(json.dumps(result))
        flat = [said for each in result.values() for row in each.values() for said in row.values()]
        wrong = sum(said.startswith("wrong") for said in flat)
        exact = flat.count("exact")
        print(f"transformers {versions.transformers_version()}: {len(flat)} cells, {exact} exact, {wrong} wrong")
        sys.exit(1 if wrong else 0)
