"""Reads where the examples of a feature end, which may itself be a packed row of several."""

from __future__ import annotations

import torch

from ..batch.boundaries import jump_of_positions, lengths_of_segments
from ..batch.sequences import PackedSequences
from ..errors import PadfreeError
from .boundary_columns import KEPT
from .fields import Feature, kept_lengths, mask_values, token_values


def lengths_inside(feature: Feature, tokens: int, index: int, *, keeps_positions: bool = False) -> list[int]:
    """Returns tokens per example of a feature, which may itself be a packed row of several examples.

    Args:
        feature: the example.
        tokens: how many it has.
        index: in the batch.
        keeps_positions: whether its position_ids go into the batch as they are, so that other fields say where
            examples end.

    Raises PadfreeError if its fields disagree about them, or do not cover its number of `tokens`.
    """
    lengths_by_field = _lengths_by_field(feature, tokens, index)
    if keeps_positions:
        lengths_by_field.pop("position_ids", None)
    else:
        _check_no_jump(feature, lengths_by_field, index)
    if not lengths_by_field:
        return [tokens]
    lengths, *others = lengths_by_field.values()
    if sum(lengths) != tokens or any(other != lengths for other in others):
        said = " and ".join(f"{name} say {each}" for name, each in lengths_by_field.items())
        raise PadfreeError(f"example {index} has {tokens} tokens, but {said}")
    return lengths


def _lengths_by_field(feature: Feature, tokens: int, index: int) -> dict[str, list[int]]:
    """Returns tokens per example as each field says that can say it."""
    lengths = {}
    if feature.get("seq_lengths") is not None:
        lengths["seq_lengths"] = token_values(feature, "seq_lengths", index).tolist()
    if (kept := kept_lengths(feature)) is not None:
        lengths[KEPT] = kept
    if feature.get("position_ids") is not None:
        positions = token_values(feature, "position_ids", index)
        if len(positions) != tokens:
            raise PadfreeError(f"example {index} has {tokens} tokens, but {len(positions)} position_ids")
        lengths["position_ids"] = list(PackedSequences.from_position_ids(torch.from_numpy(positions)).lengths)
    if mask_values(feature, "attention_mask", tokens, f"example {index}").max(initial=0) > 1:
        lengths["attention_mask"] = _lengths_of_segments(feature, "attention_mask", index)
    if feature.get("seq_idx") is not None:
        lengths["seq_idx"] = _lengths_of_segments(feature, "seq_idx", index)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if feature.get(name) is not None:
            cu_seqlens = torch.from_numpy(token_values(feature, name, index))
            lengths[name] = list(PackedSequences.from_cu_seqlens(cu_seqlens).lengths)
    if (packed := feature.get("packed_sequences")) is not None:
        if not isinstance(packed, PackedSequences):
            raise PadfreeError(
                f"example {index}: packed_sequences must be PackedSequences, found {type(packed).__name__}"
            )
        if packed.prefixes is not None:
            raise PadfreeError(
                f"example {index} is a row whose examples share prompts, which can't be part of another row; collate "
                "the examples themselves"
            )
        lengths["packed_sequences"] = list(packed.lengths)
    return lengths


def _check_no_jump(feature: Feature, lengths_by_field: dict[str, list[int]], index: int) -> None:
    """Raises PadfreeError for position_ids that jump ahead where no other field says that an example ends."""
    said = lengths_by_field.get("position_ids")
    if said is None or list(lengths_by_field.values()).count(said) > 1:
        return
    jump = jump_of_positions(torch.from_numpy(token_values(feature, "position_ids", index)))
    if jump is not None:
        raise PadfreeError(
            f"example {index}: position_ids jump ahead from {jump.before} to {jump.after} after token {jump.token}. If "
            f"an example ends there, give seq_lengths={said} too. If the text goes on, its positions would be lost, "
            "because the collator counts its own: name position_ids in token_fields=, and give seq_lengths and "
            "return_flash_attn_kwargs=True, or leave the field out"
        )


def _lengths_of_segments(feature: Feature, name: str, index: int) -> list[int]:
    return lengths_of_segments(torch.from_numpy(token_values(feature, name, index)))
