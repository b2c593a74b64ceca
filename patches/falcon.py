"""Falcon: rotary or ALiBi, three head layouts, old and new decoder, parallel or serial.

Two things need more than another kernel, both in `attention_call`:

- ALiBi is a bias on keys by their position in the row, rounded to bfloat16; upstream's own function makes it here for
  each sequence from 0 on. Models loaded as eager add it twice since 4.45 (once to the scores, once in the mask), and so
  does the packed row. FalconFlashAttention2 refuses ALiBi; eager's forward serves its packed rows instead.
- In 4.34 the attention can't do without a mask.

Read against models/falcon/modeling_falcon.py of transformers 4.34.1, 4.35.2, 4.36.2, 4.41.2, 4.44.2, 4.45.2, 4.47.1,
4.57.6 and 5.23.0.
"""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from padfree_patch import AttentionCall, Patch, versions
from padfree_patch.batch.packed_batch import PackedBatch
from padfree_patch.models import implementation_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ADDS_TWICE = ">=4.45"
"""transformers versions whose eager attention adds ALiBi to the scores and has it in the mask too."""


def attention_call(call: AttentionCall) -> AttentionCall:
    """Gives a packed call of FalconAttention ALiBi as a bias on keys, and in 4.34 a mask."""
    attention = call.call.module
    device = call.batch.position_ids.device
    eager: type[nn.Module] = next(base for base in type(attention).__mro__ if base.__name__ == "FalconAttention")
    inner = call.call
    if versions.transformers("<4.35") and type(attention) is eager:
        inner = inner.changed(attention_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device))  # True is masked
    if not attention.config.alibi:
        return dataclasses.replace(call, call=inner)
    implementation = implementation_of(attention.config)
    forward = eager.forward if implementation == "flash_attention_2" else None
    alibi = _alibi(call.batch, attention.num_heads, sys.modules[eager.__module__])
    rows = call.batch.position_ids.shape[0]
    given = alibi.view(len(alibi), rows, -1).transpose(0, 1)  # (B, H, T): takes upstream's ALiBi path
    twice = implementation == "eager" and versions.transformers(_ADDS_TWICE)
    bias = alibi * 2 if twice else alibi
    return dataclasses.replace(call, call=inner.changed(original=forward, alibi=given), key_bias=bias)


def _alibi(batch: PackedBatch, heads: int, modeling: ModuleType) -> Tensor:
    """Returns upstream's ALiBi, (H, B * T), counted from 0 in each sequence."""
    sequences = batch.sequences
    tokens = sequences.max_seqlen if sequences.prefixes is None else max(sequences.whole_lengths)
    longest = torch.ones(1, tokens, dtype=torch.long, device=batch.position_ids.device)
    table: Tensor = modeling.build_alibi_tensor(longest, heads, dtype=torch.float32)  # (H, 1, longest)
    return table.squeeze(1)[:, batch.positions_from_zero.reshape(-1)]


def upstream_refuses(config: PretrainedConfig) -> str | None:
    """Says why upstream runs no call of a model of this config; None if it does."""
    refused = config.alibi and implementation_of(config) == "flash_attention_2"
    return "upstream's flash_attention_2 refuses ALiBi: only packed batches run, as on sdpa" if refused else None


def quirks(config: PretrainedConfig) -> list[str]:
    """Says what upstream does with ALiBi that one would not expect."""
    if not config.alibi:
        return []
    if refused := upstream_refuses(config):
        return [refused]
    implementation = implementation_of(config)
    if implementation == "eager" and versions.transformers(_ADDS_TWICE):
        return ["upstream's eager attention adds ALiBi twice in this version; so does apply (sdpa adds it once)"]
    if implementation == "sdpa" and versions.transformers("<4.40"):
        return ["without an attention_mask, upstream's sdpa is not causal in this version; the packed row always is"]
    return []


PATCH = Patch(
    model_type="falcon",
    attention="FalconAttention",
    decoder="FalconModel",
    transformers=">=4.34,<5.25",
    tiny={"num_kv_heads": 2, "new_decoder_architecture": True},
    attention_call=attention_call,
    attention_call_needs="alibi" if versions.transformers(">=4.35") else "",
    attention_call_knows_prompts=True,
    quirks=quirks,
    upstream_refuses=upstream_refuses,
    variants={
        "one key head": {"new_decoder_architecture": False, "multi_query": True},
        "all key heads": {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 6},
        "serial": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": False},
        "biases": {"bias": True},
        "dynamic rope": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
        "alibi": {"alibi": True},
        "alibi, one key head": {"alibi": True, "new_decoder_architecture": False, "multi_query": True},
    },
)
