"""Tries `apply` on a tiny model of every causal language model of this transformers; writes what came of it as JSON.

python tools/breadth.py OUTPUT.json [MODEL TYPE...]

A packed row of three examples is compared with each example alone, through an unpatched copy: logits, the gradients of
every parameter, and these again under both kinds of gradient checkpointing. The models are loaded as upstream does by
itself ("default"), as eager, and as flash_attention_2, through a stand-in for the package. `nox -s breadth` runs it on
six versions; tools/breadth_page.py puts the results together.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import json
import logging
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config_rules import VOCABULARY
from helpers import flash_attention_here
from padfree_patch import PadfreeError, apply, versions
from padfree_patch.any_decoder.way import ways_of
from padfree_patch.patching import way_of
from padfree_patch.registry import patch_for
from padfree_patch.seams.kernel import recording_windows
from padfree_patch.testing import checkpointing
from tiny_configs import all_types, tiny_model

LENGTHS = (11, 7, 14)
LOGIT_BAR = 2e-5
"""Of the largest error of a logit, relative to the largest logit; float32."""
GRADIENT_BAR = 2e-4
"""Of the largest error of a parameter's gradient, relative to its largest element."""
SMALLEST_GRADIENT = 1e-3
"""Of the largest gradient of all: what is smaller counts as this large, since its rounding is that of larger ones."""
IMPLEMENTATIONS = ("default", "eager", "flash_attention_2")
KINDS = ("not reentrant", "reentrant")
NO_DECODER = ("is not causal", "is an encoder-decoder")
"""What `apply` says of models that packed rows make no sense for."""
FAILS_ALONE = "fails without padfree_patch too"

Apply = Callable[[nn.Module], object]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a model gives for the examples: what it shows for each token, and the gradient of each parameter."""

    output: Tensor
    gradients: dict[str, Tensor]

    def errors(self, expected: Result) -> tuple[float, float]:
        """Returns the largest error of the output and of the gradients, relative to what is expected."""
        largest = max(each.abs().max().item() for each in expected.gradients.values())
        names = self.gradients.keys() | expected.gradients.keys()
        error = max(self._gradient_error(expected, name, SMALLEST_GRADIENT * largest) for name in names)
        return relative(self.output, expected.output), error

    def _gradient_error(self, expected: Result, name: str, floor: float) -> float:
        mine, theirs = (each.gradients.get(name, torch.zeros(())) for each in (self, expected))
        return ((mine - theirs).abs().max() / theirs.abs().max().clamp_min(floor)).item()

    def is_exact(self, expected: Result) -> bool:
        output, gradients = self.errors(expected)
        return output < LOGIT_BAR and gradients < GRADIENT_BAR  # a NaN is not


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def ids_of(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCABULARY - 7, (1, length), generator=generator) for length in LENGTHS]


def packed(model: nn.Module, ids: Sequence[Tensor]) -> dict[str, Any]:
    """Returns a packed row; a model that takes no positions is told by numbers in the mask where examples end."""
    row = {"input_ids": torch.cat(list(ids), dim=1)}
    parameters = inspect.signature(type(model).forward).parameters
    if "position_ids" in parameters or any(each.kind == each.VAR_KEYWORD for each in parameters.values()):
        return {**row, "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None]}
    numbers = [torch.full((length,), number + 1) for number, length in enumerate(LENGTHS)]
    return {**row, "attention_mask": torch.cat(numbers)[None]}


def alone(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """Returns one example, without a cache: RWKV's breaks upstream's own backward."""
    takes_cache = "use_cache" in inspect.signature(type(model).forward).parameters
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **({"use_cache": False} if takes_cache else {})}


def run(model: nn.Module, calls: Sequence[dict[str, Any]]) -> Result:
    """Runs calls of a model in training, and returns their outputs end to end, and the gradients of all together."""
    model.train()
    model.zero_grad(set_to_none=True)
    output = torch.cat([shown(model, call) for call in calls], dim=1)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    (output * weights).sum().backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return Result(output.detach(), {name: each.clone() for name, each in gradients.items()})


def shown(model: nn.Module, call: dict[str, Any]) -> Tensor:
    """Returns a model's logits, or what a backbone has instead, (1, T, ...)."""
    output = model(**call)
    logits = output.get("logits")
    return output[0] if logits is None else logits


def rows_of(model_type: str) -> dict[str, dict[str, Any]]:
    """Returns what came of a model type, loaded in each way."""
    rows = {"default": row_of(model_type, "default")}
    for each in IMPLEMENTATIONS[1:]:
        same = rows["default"].get("implementation") == each  # upstream takes it by itself
        rows[each] = rows["default"] if same else row_of(model_type, each)
    return rows


def row_of(model_type: str, implementation: str, apply_to: Apply = apply) -> dict[str, Any]:
    """Returns what came of a model type: a verdict, and why or how good it is."""
    try:
        model = tiny_model(model_type, implementation)
    except Exception as error:
        return {"verdict": "not built", "why": said(error)}
    row = {"class": type(model).__name__, "implementation": getattr(model.config, "_attn_implementation", None)}
    return row | measured(model, apply_to, kinds_to_check(implementation))


def kinds_to_check(implementation: str) -> tuple[str, ...]:
    """Returns the kinds of checkpointing, which take half of a row's time: on older versions not for every row."""
    return KINDS if implementation == "default" or versions.transformers(">=5.24") else ()


def measured(model: nn.Module, apply_to: Apply, kinds: Sequence[str]) -> dict[str, Any]:
    unpatched = copy.deepcopy(model)
    try:
        expected = run(copy.deepcopy(unpatched), [alone(model, each) for each in ids_of(5)])
    except Exception as error:
        return {"verdict": "upstream fails", "why": said(error)}
    begin = time.process_time()
    try:
        apply_to(model)
    except PadfreeError as error:
        return {"verdict": kind_of_refusal(str(error)), "why": str(error)}
    except Exception as error:
        return {"verdict": "crashed", "why": f"apply: {said(error)}"}
    seconds = round(time.process_time() - begin, 2)
    try:
        with recording_windows() as windows:
            found = run(model, [packed(model, ids_of(5))])
        kind, way = way_in_words(model, unpatched, kernels=bool(windows))
    except PadfreeError as error:
        return {"verdict": "refused", "why": f"not by apply, but at the first packed call in training: {error}"}
    except Exception as error:
        return {"verdict": "crashed", "why": f"a packed row: {said(error)}"}
    rows = "exact"
    try:
        moved = moved_by_neighbour(model, expected)
    except PadfreeError as error:
        rows, moved = f"refused: {said(error)}", 0.0
    except Exception as error:
        return {"verdict": "crashed", "why": f"two packed rows: {said(error)}", "kind": kind, "way": way}
    output, gradients = found.errors(expected)
    under = {each: checkpointed(model, unpatched, expected, each) for each in kinds}
    worst = [word for word in ("WRONG", "crashed") if any(said.startswith(word) for said in under.values())]
    row = {"verdict": [*worst, "exact"][0] if found.is_exact(expected) and moved < LOGIT_BAR else "WRONG"}
    row |= {"kind": kind, "way": way, "logits": output, "gradients": gradients, "moved": moved}
    return row | {"rows": rows, "seconds": seconds, "checkpointed": under}


def kind_of_refusal(why: str) -> str:
    if FAILS_ALONE in why:
        return "upstream fails"
    return "no decoder" if any(each in why for each in NO_DECODER) else "refused"


def moved_by_neighbour(model: nn.Module, expected: Result) -> float:
    """Returns how far a batch of two rows is off in eval mode: as before, and with another first example.

    The logits of the other examples must be the same in both.
    """
    model.eval()
    ids = ids_of(5)
    calls = [packed(model, each) for each in (ids, [ids_of(6)[0], *ids[1:]])]
    with torch.no_grad():
        before, after = shown(model, {name: torch.cat([each[name] for each in calls]) for name in calls[0]}).split(1)
    first = LENGTHS[0]
    return max(relative(after[:, first:], before[:, first:]), relative(before, expected.output))


def checkpointed(model: nn.Module, unpatched: nn.Module, expected: Result, kind: str) -> str:
    """Says what the row gives under gradient checkpointing: exact, WRONG, refused, crashed, or that upstream fails."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        return "upstream has none"
    patched, calls = copy.deepcopy(model), [packed(model, ids_of(5))]
    try:
        checkpointing(reentrant=kind == "reentrant")(patched)
        found = run(patched, calls)
    except PadfreeError as error:
        return f"refused: {said(error)}"
    except Exception as error:
        return upstream_checkpointed(unpatched, expected, kind) or f"crashed: {said(error)}"
    if found.is_exact(expected):
        return "exact"
    output, gradients = found.errors(expected)
    return upstream_checkpointed(unpatched, expected, kind) or f"WRONG: logits {output:.1e}, gradients {gradients:.1e}"


def upstream_checkpointed(unpatched: nn.Module, expected: Result, kind: str) -> str | None:
    """Says how upstream, unpatched, goes wrong with each example alone under checkpointing; None if it does not."""
    model = copy.deepcopy(unpatched)
    try:
        checkpointing(reentrant=kind == "reentrant")(model)
        found = run(model, [alone(model, each) for each in ids_of(5)])
    except Exception as error:
        return f"upstream fails: {said(error)}"
    if found.is_exact(expected):
        return None
    return f"upstream is wrong: gradients {found.errors(expected)[1]:.1e}"


def way_in_words(model: nn.Module, unpatched: nn.Module, *, kernels: bool) -> tuple[str, str]:
    """Returns how the examples are kept apart: a word for tables, and what `explain` says of it.

    "fast" is a varlen kernel for attention, "mixers" are what else mixes tokens and runs on each sequence.
    """
    if not (way := way_of(model)):
        return "registered" if patch_for(model) is not None else "none", ""
    found, named = way.replace("per sequence, named by verify", "named"), "named by verify" in way
    if kernels:
        word = "fast, mixers per sequence" if "per sequence" in found else "fast"
    else:
        slow = [str(each) for each in ways_of(unpatched) if not each.fast]  # per sequence, and by whole layers
        word = "per layer" if len(slow) > 1 and slow[1] != slow[0] and way.startswith(slow[1]) else "per sequence"
    return word + (", named modules" if named else ""), way


def said(error: BaseException) -> str:
    """Returns the first line of an error, without the folder that this machine has its packages in."""
    line = re.sub(r"[^\s'\"]*/site-packages/", "", (str(error).splitlines() or [""])[0])
    return f"{type(error).__name__}: {line[:200]}"


def main(output: str, *types: str) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    flash_attention_here.pretend()
    tables: dict[str, dict[str, dict[str, Any]]] = {each: {} for each in IMPLEMENTATIONS}
    for model_type in types or all_types():
        gc.collect()
        gc.freeze()  # what was imported so far: apply collects garbage, which takes as long as there are objects
        for implementation, row in rows_of(model_type).items():
            tables[implementation][model_type] = row
            if row["verdict"] in ("WRONG", "crashed", "refused"):
                print(f"{implementation} {model_type}: {row}", flush=True)
        Path(output).write_text(json.dumps(tables))
    for implementation, rows in tables.items():
        print(f"{implementation}: {dict(Counter(row['verdict'] for row in rows.values()))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
