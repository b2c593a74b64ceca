"""Measures what transformers, unpatched, does with a packed row, in each way of calling it; and whether Trainers do so.

python tools/upstream_ways.py OUTPUT.json     one version, on a tiny model of every registered architecture

`nox -s ways` runs it on every minor, and `tools/matrix.py --ways` puts all of them together. A row of two examples is
compared with each example alone, and one of them is then exchanged: where the other's logits move, examples mix.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers import flash_attention_here
from padfree_patch import versions
from padfree_patch.registry import Patch, registry
from padfree_patch.testing import Unavailable, checkpointing, conformance, examples, pack, tiny_model
from padfree_patch.testing.oracle import LOGIT_TOLERANCE, largest
from padfree_patch.testing.stored import Stored

LENGTHS = (9, 8)

Call = Callable[[Any, list[Tensor]], Tensor]
"""Runs an unpatched model on a row of examples (1, length) each; returns logits (1, T, V)."""


def plainly(model: Any, sequences: list[Tensor]) -> Tensor:
    logits: Tensor = model(**pack(sequences)).logits
    return logits


def without_cache(model: Any, sequences: list[Tensor]) -> Tensor:
    logits: Tensor = model(**pack(sequences), use_cache=False).logits
    return logits


def with_ones(model: Any, sequences: list[Tensor]) -> Tensor:
    batch = pack(sequences)
    logits: Tensor = model(**batch, attention_mask=torch.ones_like(batch["input_ids"]), use_cache=False).logits
    return logits


def with_lengths(model: Any, sequences: list[Tensor]) -> Tensor:
    """As transformers' collator gives them with return_flash_attn_kwargs=True, while training with checkpointing."""
    checkpointing(reentrant=False)(model.train())
    logits: Tensor = model(**pack(sequences), **lengths_of(sequences), use_cache=False).logits
    return logits


def with_lengths_only(model: Any, sequences: list[Tensor]) -> Tensor:
    """Without positions, which the collator leaves out with return_position_ids=False."""
    checkpointing(reentrant=False)(model.train())
    ids = torch.cat(sequences, dim=1)
    logits: Tensor = model(input_ids=ids, **lengths_of(sequences), use_cache=False).logits
    return logits


def with_segments(model: Any, sequences: list[Tensor]) -> Tensor:
    """As LLaMA-Factory's neat_packing numbers the examples of a row in the mask."""
    segments = torch.cat([torch.full_like(each, number) for number, each in enumerate(sequences, 1)], dim=1)
    logits: Tensor = model(**pack(sequences), attention_mask=segments, use_cache=False).logits
    return logits


def in_two_rows(model: Any, sequences: list[Tensor]) -> Tensor:
    """As rows of `pack_dataset` come, several in a batch."""
    batch = {name: tensor.repeat(2, 1) for name, tensor in pack(sequences).items()}
    logits: Tensor = model(**batch, use_cache=False).logits
    return logits[1:]


def with_padded_end(model: Any, sequences: list[Tensor]) -> Tensor:
    """As `pad_to_multiple_of` makes a row: some tokens more, and a mask that says so."""
    batch = pack([*sequences, torch.zeros_like(sequences[0][:, :3])])
    mask = torch.ones_like(batch["input_ids"])
    mask[:, -3:] = 0
    logits: Tensor = model(**batch, attention_mask=mask, use_cache=False).logits
    return logits[:, :-3]


def lengths_of(sequences: list[Tensor]) -> dict[str, Any]:
    lengths = [each.shape[1] for each in sequences]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return {
        f"{name}_{which}": v
        for which in "qk"
        for name, v in (("cu_seq_lens", cu_seqlens), ("max_length", max(lengths)))
    }


WAYS: dict[str, Call] = {
    "model(**batch)": plainly,
    "use_cache=False": without_cache,
    "a mask of ones": with_ones,
    "segment numbers": with_segments,
    "two rows": in_two_rows,
    "a padded end": with_padded_end,
    "lengths too, checkpointing": with_lengths,
    "lengths alone, checkpointing": with_lengths_only,
}


"""All but the first with use_cache=False."""

OF_EAGER = list(WAYS)[:3]
"""eager gets the masks that sdpa gets; these show it."""

TRAINER = "trainer"
"""Key of the way in which the Trainer calls."""


def found_here() -> dict[str, Any]:
    """Returns what was measured here: the Trainer's way, and implementation -> way -> word -> model types."""
    words = {
        implementation: {way: model_types_by_word(implementation, WAYS[way]) for way in ways}
        for implementation, ways in {"sdpa": WAYS, "eager": OF_EAGER, "flash_attention_2": WAYS}.items()
    }
    return {TRAINER: trainers_way(), **words}


def model_types_by_word(implementation: str, call: Call) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for patch in registry().patches():
        if (word := word_for(patch, implementation, call)) != "absent":
            found.setdefault(word, []).append(patch.model_type)
    return found


def trainers_way() -> str:
    """Names the way of the Trainer: it writes its argument `use_cache`, where it has one, into the model's config."""
    from transformers import TrainingArguments

    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    return "use_cache=False" if defaults.get("use_cache") is False else "model(**batch)"


def word_for(patch: Patch, implementation: str, call: Call) -> str:
    """Says of an unpatched model: "exact", "mixes", "wrong" (isolated, not what alone gives), "fails" or "absent"."""
    double = implementation == "flash_attention_2" and versions.transformers("<4.37")  # see matrix.verdict
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    try:
        made = model_of(patch, implementation)
    except Unavailable:
        return "absent"
    make = Stored(made)
    (a, b), (other_a,) = examples(LENGTHS), examples(LENGTHS[:1], seed=2)
    try:
        alone = logits_alone(patch, implementation)
        with torch.no_grad():
            packed, changed = (call(make(), [each, b]) for each in (a, other_a))
    except Exception:  # upstream's own
        return "fails"
    allowed = LOGIT_TOLERANCE * largest(alone)
    if largest((packed - changed)[:, LENGTHS[0] :]) > allowed:
        return "mixes"
    return "exact" if largest(packed - alone) < allowed else "wrong"


@functools.cache
def logits_alone(patch: Patch, implementation: str) -> Tensor:
    return conformance.logits_alone(Stored(model_of(patch, implementation)), examples(LENGTHS))


@functools.cache
def model_of(patch: Patch, implementation: str) -> Any:
    return tiny_model(patch, implementation)


def main(output: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    Path(output).write_text(json.dumps(found_here()))


if __name__ == "__main__":
    flash_attention_here.pretend()
    main(sys.argv[1])
