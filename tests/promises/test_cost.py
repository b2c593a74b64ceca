"""Promise 4: boundaries cost one device sync per forward, none with lengths, and no T x T tensor is ever made."""

from __future__ import annotations

import pytest
import torch

from padfree_patch import DataCollatorWithFlattening, applied
from padfree_patch.testing import LargestTensor, SyncCounter, examples, pack

pytestmark = pytest.mark.versions


def syncs_of(model, batch) -> int:
    model(**batch)  # what is measured once per process (windows) is measured
    with SyncCounter() as syncs, torch.no_grad():
        model(**{name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()})
    return syncs.total


@pytest.fixture
def six_layers(make):
    return make(num_hidden_layers=6)


def test_one_sync_from_position_ids(six_layers):
    with applied(six_layers):
        assert syncs_of(six_layers, pack(examples((5, 9, 1, 12)))) == 1


def test_one_sync_from_position_ids_and_mask(six_layers):
    batch = pack(examples((5, 9)))
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with applied(six_layers):
        assert syncs_of(six_layers, batch) == 1


def test_one_sync_from_a_segment_mask(six_layers):
    batch = {"input_ids": torch.cat(examples((2, 3)), 1), "attention_mask": torch.tensor([[1, 1, 2, 2, 2]])}
    with applied(six_layers):
        assert syncs_of(six_layers, batch) == 1


@pytest.mark.parametrize("return_position_ids", [True, False])
def test_no_sync_with_the_collators_lengths(six_layers, return_position_ids):
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=return_position_ids)
    batch = collator([{"input_ids": each[0].tolist()} for each in examples((5, 9, 1, 12))])
    with applied(six_layers):
        assert syncs_of(six_layers, batch) == 0


def test_ordinary_calls_cost_no_sync_more(six_layers):
    (ids,) = examples((9,))
    batch = {"input_ids": ids}
    unpatched = syncs_of(six_layers, batch)
    with applied(six_layers):
        assert syncs_of(six_layers, batch) == unpatched


def test_counter_sees_a_sync_per_layer(six_layers):
    """The control: something that reads the positions in every layer is counted in every layer."""

    def read(*_):
        torch.ones(1).item()

    hooks = [layer.register_forward_hook(read) for layer in six_layers.model.layers]
    with applied(six_layers, verify=False):
        assert syncs_of(six_layers, pack(examples((5, 9)))) == 1 + len(hooks)


def test_no_tensor_of_tokens_squared(make):
    tokens = 4096
    lengths = [256] * 16
    batch = pack(examples(lengths))
    model = make(max_position_embeddings=tokens, num_hidden_layers=2)
    with applied(model), LargestTensor() as largest, torch.no_grad():
        model(**batch)
    assert largest.elements < tokens * tokens / 8, f"{largest.operator} made {largest.shape}"


def test_largest_tensor_sees_upstreams_mask(make):
    """The control: unpatched with a padding mask, the same row makes a mask, or scores, of T x T."""
    tokens = 1024
    batch = pack(examples([tokens]))
    mask = torch.ones_like(batch["input_ids"])
    mask[:, -1] = 0
    model = make(max_position_embeddings=tokens, num_hidden_layers=1)
    with LargestTensor() as largest, torch.no_grad():
        model(**batch, attention_mask=mask)
    assert largest.elements >= tokens * tokens
