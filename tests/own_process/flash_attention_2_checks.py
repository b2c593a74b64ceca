"""Models loaded as flash_attention_2, on the CPU: upstream's own code around the stand-in for flash-attn.

Run by `nox -s tests` in a process of its own, because transformers must believe in flash-attn before its modeling files
are imported. All architectures and variants: `nox -s matrix`. With the real package: `nox -s flash_attn`.
"""

from __future__ import annotations

from helpers import flash_attention_here

flash_attention_here.pretend()

import flash_attn
import pytest
import torch

from helpers import holes
from helpers.models import seen_by_the_last_token
from padfree_patch import applied, apply, explain, versions
from padfree_patch.registry import registry
from padfree_patch.testing import CHECKS, SyncCounter, Unavailable, conformance, examples, pack, tiny_model
from padfree_patch.testing.shared_prompts import check_shared_prompts

RUNNING = versions.transformers_version()


def make_of(model_type, **config):
    return lambda: tiny_model(registry().get(model_type), "flash_attention_2", **config)


def monotone(batch):
    """Positions that never decrease (lengths 1, 1, 1, 5): upstream looks for a decrease."""
    return batch


# Where the hole is open, on Llama but for the lengths, measured upstream on 4.34 to 5.23.
OPEN = [
    (holes.default_call, "llama", "<4.44", holes.LENGTHS),
    (holes.mask_of_ones, "llama", "<4.44", holes.LENGTHS),
    (holes.one_zero_in_the_mask, "llama", ">=4.34", holes.LENGTHS),
    (holes.segment_mask, "llama", ">=4.34", holes.LENGTHS),
    (holes.lengths_without_positions, "falcon", ">=4.34", holes.LENGTHS),
    (holes.lengths_without_positions, "stablelm", ">=4.38", holes.LENGTHS),
    (monotone, "llama", "<4.54", (1, 1, 1, 5)),
    (holes.start_elsewhere, "llama", ">=4.34", holes.LENGTHS),  # it cuts where positions are 0
]


@pytest.mark.parametrize(
    ("call", "model_type", "where", "lengths"), OPEN, ids=lambda value: getattr(value, "__name__", value)
)
def test_hole_is_open_unpatched_and_closed_by_the_patch(call, model_type, where, lengths):
    make = make_of(model_type)
    if not exists(make):
        pytest.skip(f"transformers {RUNNING} has no {model_type}")
    if versions.inside(RUNNING, where):
        assert holes.is_open(make, call, lengths)
    with applied(make()) as model:
        assert holes.error_of(make, model, call, lengths) < conformance.LOGIT_TOLERANCE


def exists(make) -> bool:
    try:
        make()
    except Unavailable:
        return False
    return True


def test_two_packed_rows_of_a_batch_are_exact():
    """Open unpatched on 4.53 and from 4.55 on, and before 4.44."""
    make = make_of("llama")
    if any(versions.inside(RUNNING, where) for where in ("<4.44", "==4.53.*", ">=4.55")):
        with pytest.raises(AssertionError):
            conformance.check_rows(make, patched=False)
    conformance.check_rows(make)


@pytest.mark.parametrize("reentrant", [True, False])
def test_lengths_reach_layers_that_checkpointing_runs_again(reentrant):
    """Upstream loses them on the way to its layers until 4.50."""
    make = make_of("llama")

    def gradients(model):
        conformance.checkpointing(reentrant=reentrant)(model.train())
        batch = pack(examples(holes.LENGTHS))
        call = holes.lengths_without_positions(batch)
        model(**call, labels=batch["input_ids"].masked_fill(batch["position_ids"] == 0, -100)).loss.backward()
        return model

    _, expected = conformance.alone_loss_and_gradients(make, examples(holes.LENGTHS))
    if versions.inside(RUNNING, "<4.51"):
        with pytest.raises((AssertionError, TypeError)):
            conformance.assert_gradients_close(gradients(make()), expected)
    with applied(make()) as model:
        conformance.assert_gradients_close(gradients(model), expected)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_patched_model_passes(check, model_type):
    make = make_of(model_type)
    if not exists(make):
        pytest.skip(f"transformers {RUNNING} has no {model_type}")
    check(make)


def test_packed_row_never_reaches_upstreams_kernel_and_an_ordinary_one_does():
    """On the CPU the sdpa backend serves packed rows; the oracle runs on flash-attn's own functions."""
    flash_attn.calls.clear()
    with applied(make_of("llama")()) as model, torch.no_grad():
        assert flash_attn.calls  # verify runs each example alone
        flash_attn.calls.clear()
        model(**pack(examples((5, 9))))
        assert not flash_attn.calls
        model(input_ids=examples((9,))[0])
        assert flash_attn.calls["dense"] or flash_attn.calls["varlen"]


def test_one_sync_where_upstream_asks_in_every_layer():
    make = make_of("mistral", num_hidden_layers=6)
    batch = pack(examples((5, 9)))
    if versions.inside(RUNNING, "<4.42"):
        with torch.no_grad():
            assert conformance.syncs_of(make(), {"input_ids": batch["input_ids"]}) >= 6
    with applied(make()) as model, torch.no_grad(), SyncCounter() as syncs:
        model(**batch)
    assert syncs.total <= (2 if versions.inside(RUNNING, "<4.45") else 1)  # 2: see conformance.allowed_syncs


def test_window_is_that_of_upstreams_flash_attention():
    """Measured by changing tokens; also told of a window that the probe's row does not fill."""
    seen = seen_by_the_last_token(make_of("mistral", sliding_window=4, num_hidden_layers=1)())
    for window in (4, 1000):
        found = explain(make_of("mistral", sliding_window=window)())
        assert found.implementation == "flash_attention_2"
        assert set(found.windows) == {seen - 4 + window}


def test_alibi_that_upstream_refuses_is_exact():
    falcon = registry().get("falcon")
    other = "eager" if versions.inside(RUNNING, "<4.36") else "sdpa"
    sequences = examples((5, 9, 1, 12))
    expected = conformance.logits_alone(lambda: tiny_model(falcon, other, alibi=True), sequences)
    model = make_of("falcon", alibi=True)()
    with torch.no_grad(), pytest.raises(ValueError, match="alibi"):
        model(input_ids=sequences[0])
    apply(model)
    assert "refuses ALiBi" in explain(model).now.alone_refused
    with torch.no_grad():
        found = model(**pack(sequences)).logits
    assert conformance.largest(found - expected) < conformance.LOGIT_TOLERANCE * conformance.largest(expected)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "falcon"])
def test_examples_that_share_prompts_get_what_they_get_alone(model_type):
    check_shared_prompts(make_of(model_type))
