"""verify on a batch of the caller's: each example alone, at the lengths that are trained on."""

from __future__ import annotations

import pytest
import torch

from padfree_patch import DataCollatorWithFlattening, PadfreeError, applied, verify
from padfree_patch.testing import examples, pack, pad

LENGTHS = (40, 3, 25, 1)


def flattened(**options):
    rows = [{"input_ids": each[0].tolist()} for each in examples(LENGTHS)]
    return DataCollatorWithFlattening(**options)(rows)


@pytest.mark.versions
@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True}, {"pad_to_multiple_of": 8}], ids=str)
def test_patched_model_gives_each_example_what_it_gives_alone(make, options):
    with applied(make()) as model:
        result = verify(model, flattened(**options))
    assert result and result.isolated
    assert result.examples >= len(LENGTHS)
    assert result.alone_error < 2.1e-5
    assert "examples of a batch: each as alone" in str(result)


@pytest.mark.versions
def test_lengths_alone_say_where_examples_end(llama):
    """Before 4.48 no forward of upstream names them, or takes what it does not name."""
    batch = flattened(return_flash_attn_kwargs=True)
    del batch["position_ids"]
    with applied(llama):
        assert verify(llama, batch)


@pytest.mark.versions
def test_unpatched_model_does_not(make):
    result = verify(make(), pack(examples(LENGTHS)))
    assert not result
    assert result.alone_error > 1e-3
    with pytest.raises(PadfreeError, match="NOT WHAT EACH GIVES ALONE"):
        result.raise_if_leaking()


def test_what_only_long_rows_show_is_found(llama):
    class LooksBackInLongRows(torch.nn.Module):
        def forward(self, x):
            return x + 0.1 * x.roll(1, dims=1) if x.shape[1] > 45 else x

    llama.model.layers[1].mlp = torch.nn.Sequential(llama.model.layers[1].mlp, LooksBackInLongRows())
    with applied(llama):
        assert verify(llama)
        assert not verify(llama, flattened())


def test_rows_of_several_examples_and_their_modes_are_kept(llama):
    row = pack(examples((9, 8)))
    batch = {name: value.repeat(2, 1) for name, value in row.items()}
    with applied(llama.train()):
        result = verify(llama, batch)
    assert result and result.examples == 4 and llama.training
    assert all(each.grad is None for each in llama.parameters())


@pytest.mark.parametrize("batch", [pad(examples((5, 9))), {"input_ids": torch.arange(6)[None]}, {"labels": 3}], ids=str)
def test_a_batch_that_is_not_packed_is_an_error(llama, batch):
    with (
        applied(llama),
        pytest.raises(PadfreeError, match=r"batch to verify (has no second example|must have input_ids)"),
    ):
        verify(llama, batch)
