"""Calls in which upstream mixes examples without a word, and how far a model's result then is from the right one."""

from __future__ import annotations

import torch

from padfree_patch import PackedSequences
from padfree_patch.testing import conformance, examples, pack

LENGTHS = (5, 9, 4)


def default_call(batch):
    """use_cache is on unless somebody switches it off."""
    return batch


def mask_of_ones(batch):
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"]), "use_cache": False}


def one_zero_in_the_mask(batch):
    mask = torch.ones_like(batch["input_ids"])
    mask[:, -1] = 0  # the last token of the last example: nothing that is compared sees it
    return {**batch, "attention_mask": mask, "use_cache": False}


def segment_mask(batch):
    segments = batch["position_ids"].eq(0).cumsum(1)
    return {"input_ids": batch["input_ids"], "attention_mask": segments, "use_cache": False}


def lengths_without_positions(batch):
    sequences = PackedSequences.from_position_ids(batch["position_ids"])
    given = {"cu_seq_lens_q": sequences.cu_seqlens, "cu_seq_lens_k": sequences.cu_seqlens}
    given |= {"max_length_q": sequences.max_seqlen, "max_length_k": sequences.max_seqlen}
    return {"input_ids": batch["input_ids"], **given, "use_cache": False}


def start_elsewhere(batch):
    """The first example begins at position 3."""
    return {**batch, "position_ids": batch["position_ids"] + 3 * (batch["position_ids"].eq(0).cumsum(1) == 1)}


CALLS = [default_call, mask_of_ones, one_zero_in_the_mask, segment_mask, lengths_without_positions]


def error_of(make, model, call, lengths=LENGTHS) -> float:
    """Largest difference of the logits to each example alone, relative; the last token is left out."""
    sequences = examples(lengths)
    alone = conformance.logits_alone(make, sequences)
    with torch.no_grad():
        packed = model(**call(pack(sequences))).logits
    return conformance.largest((packed - alone)[:, :-1]) / conformance.largest(alone)


def is_open(make, call, lengths=LENGTHS) -> bool:
    """Whether the unpatched model gives something else than each example alone."""
    try:
        return error_of(make, make(), call, lengths) > 1e-4
    except TypeError:
        if call is not lengths_without_positions:
            raise
        return True  # versions that don't know the arguments say so: not silent, but not closed either
