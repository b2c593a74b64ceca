"""On a device, past the ceiling: logits of labelled tokens only or in chunks, and prompts that examples share."""

from __future__ import annotations

import functools
from typing import Any

import torch
from gpu_counts import counts_of, peak_of

from padfree_patch import DataCollatorWithFlattening, applied
from padfree_patch.batch.labels import IGNORED_LABEL
from padfree_patch.measure.step import flan_like_lengths, timed_step

LOGITS = ("all", "labelled", "chunked")
LABELLED = {"a fifth": 5, "everything": 1}
"""Which part of each example's tokens has a label: its last ones."""
GROUPS = ((2, 4), (8, 4), (8, 16))
"""Completions on each prompt, and how many times as long as a completion it is."""
COMPLETION, SEQUENCES = 128, 16


def labelled_steps(model: Any, rounds: int, device: str, batch_size: int = 32) -> list[dict[str, Any]]:
    """Returns the seconds, peak bytes and syncs of a padding-free step by the logits that it computes."""
    found = []
    vocabulary = model.config.vocab_size
    for labelled, part in LABELLED.items():
        runs = []
        for seed in range(rounds + 2):
            generator = torch.Generator().manual_seed(seed)
            lengths = flan_like_lengths(batch_size, generator)
            ids = [torch.randint(vocabulary, (n,), generator=generator) for n in lengths]
            examples = [{"input_ids": each, "labels": unlabelled(each, len(each) - len(each) // part)} for each in ids]
            batch = on(device, DataCollatorWithFlattening(return_flash_attn_kwargs=True)(examples))
            runs.append({kind: peak_of(functools.partial(step, model, batch, kind), device) for kind in LOGITS})
        counts = counted(functools.partial(step, model, batch), LOGITS, device)
        found.append({"labelled": labelled, "tokens": batch["input_ids"].numel(), "rounds": runs[2:], "counts": counts})
    return found


def shared_steps(model: Any, rounds: int, device: str) -> list[dict[str, Any]]:
    """Returns the seconds and peak bytes of a step on whole examples, and on each prompt once."""
    kinds = {
        "whole": DataCollatorWithFlattening(return_flash_attn_kwargs=True),
        "shared": DataCollatorWithFlattening(share_prefixes=True),
    }
    found = []
    for group, ratio in GROUPS:
        runs, batches = [], {}
        for seed in range(rounds + 2):
            examples = groups_of(group, ratio * COMPLETION, model.config.vocab_size, seed)
            batches = {kind: on(device, collate(examples)) for kind, collate in kinds.items()}
            runs.append({kind: peak_of(functools.partial(step, model, batches[kind]), device) for kind in kinds})
        with applied(model, verify=False):
            losses = [model(**batches[kind], use_cache=False).loss.item() for kind in kinds]
        counts = counted(lambda kind, batches=batches: step(model, batches[kind]), tuple(kinds), device)
        tokens = {kind: batch["input_ids"].numel() for kind, batch in batches.items()}
        apart = abs(losses[0] - losses[1]) / losses[0]
        found.append(
            {"group": group, "ratio": ratio, "tokens": tokens, "rounds": runs[2:], "counts": counts, "apart": apart}
        )
    return found


def step(model: Any, batch: dict[str, Any], logits: str = "all") -> float:
    """Returns the seconds of a padding-free step."""
    with applied(model, verify=False, logits=logits):
        return timed_step(model, batch, patched=False)


def counted(run: Any, kinds: tuple[str, ...], device: str) -> dict[str, dict[str, int]]:
    """Returns kernels and syncs of each kind of step; nothing without CUDA."""
    return {kind: counts_of(functools.partial(run, kind)) for kind in kinds} if device == "cuda" else {}


def groups_of(group: int, prompt: int, vocabulary: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Makes groups of random completions on one random prompt each; only completions have labels."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(SEQUENCES // group):
        first = torch.randint(vocabulary, (prompt,), generator=generator)
        whole = [
            torch.cat([first, torch.randint(vocabulary, (COMPLETION,), generator=generator)]) for _ in range(group)
        ]
        examples += [{"input_ids": each, "labels": unlabelled(each, prompt)} for each in whole]
    return examples


def unlabelled(ids: torch.Tensor, first: int) -> torch.Tensor:
    """Returns labels of all tokens but the first ones."""
    labels = ids.clone()
    labels[:first] = IGNORED_LABEL
    return labels


def on(device: str, batch: dict[str, Any]) -> dict[str, Any]:
    """Moves what has a device."""
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
