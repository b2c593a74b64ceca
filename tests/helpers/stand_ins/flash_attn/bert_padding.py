"""The three helpers that transformers takes from flash_attn.bert_padding.

`unpad_input` gives four values, as until flash-attn 2.6: transformers before 4.45 can't take the fifth of 2.7 on.
"""

from __future__ import annotations

import torch


def index_first_axis(x, indices):
    return x[indices]


def unpad_input(hidden_states, attention_mask):
    lengths = attention_mask.sum(-1, dtype=torch.int32)
    indices = attention_mask.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return hidden_states.flatten(0, 1)[indices], indices, cu_seqlens, int(lengths.max())


def pad_input(hidden_states, indices, batch, seqlen):
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_put((indices,), hidden_states).unflatten(0, (batch, seqlen))
