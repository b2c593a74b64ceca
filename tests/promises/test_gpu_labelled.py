"""On CUDA, for those who have one: logits of labelled tokens only, without waiting for the device, and with Liger."""

from __future__ import annotations

import copy

import pytest
import torch

from padfree_patch import DataCollatorWithFlattening, apply
from padfree_patch.registry import registry
from padfree_patch.seams import labelled
from padfree_patch.testing import conformance, examples, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default::DeprecationWarning"),  # of Triton and Liger
]


@pytest.fixture
def batch():
    sequences = examples((50, 90, 1, 120))
    features = zip(sequences, conformance.completions(sequences))
    rows = [{"input_ids": ids[0].tolist(), "labels": labels[0].tolist()} for ids, labels in features]
    collated = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in collated.items()}


def make():
    return tiny_model(registry().get("llama"), "sdpa", max_position_embeddings=512).cuda().train()


def step(model, batch):
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: each.grad for name, each in model.named_parameters()}


def assert_same_step(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=2e-5, atol=0)
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= conformance.GRADIENT_TOLERANCE * gradient.norm(), name


@pytest.mark.parametrize("logits", ["labelled", "chunked"])
def test_a_step_waits_for_nothing_and_trains_as_with_all_logits(batch, logits, monkeypatch):
    monkeypatch.setattr(labelled, "CHUNK", 32)
    expected = step(apply(make()), batch)
    model = apply(make(), logits=logits)
    step(copy.deepcopy(model), batch)  # what is made once is made
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step(model, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_step(found, expected)


@pytest.mark.parametrize("where", ["class", "instance"])
def test_ligers_fused_loss_gets_labelled_rows(batch, where, monkeypatch):
    """Its kernel is handed the rows that have a label, and the gradients are those without Liger."""
    liger = pytest.importorskip("liger_kernel.transformers.model.llama")
    expected, rows = step(apply(make()), batch), []
    fused = liger.lce_maybe_trainable_lm_head

    def counted(head, hidden_states, *args, **kwargs):
        rows.append(hidden_states.shape[1])
        return fused(head, hidden_states, *args, **kwargs)

    monkeypatch.setattr(liger, "lce_maybe_trainable_lm_head", counted)
    model = make()
    if where == "class":
        monkeypatch.setattr(type(model), "forward", liger.lce_forward)
        apply(model, logits="labelled")
    else:
        apply(model, logits="labelled").forward = liger.lce_forward.__get__(model)
    assert_same_step(step(model, batch), expected)
    assert rows == [len(batch["labelled_rows"].rows) + 1]


def test_chunks_take_less_memory():
    """Peaks of a step of one layer with a vocabulary of 32,000 and 4,096 tokens, all labelled."""
    peaks = {}
    ids = torch.randint(3, 32000, (16, 256)).tolist()
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": each} for each in ids])
    batch = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    sizes = {"vocab_size": 32000, "num_hidden_layers": 1, "max_position_embeddings": 512, "num_attention_heads": 3}
    for logits in ("all", "chunked"):
        model = tiny_model(registry().get("llama"), "sdpa", **sizes, num_key_value_heads=3).cuda().train()
        apply(model, logits=logits)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, batch)
        peaks[logits] = torch.cuda.max_memory_allocated() - before
        del model
    assert peaks["chunked"] < 0.5 * peaks["all"], peaks
