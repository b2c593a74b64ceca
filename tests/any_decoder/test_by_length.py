"""What upstream computes by an example's length, or keeps from one call to the next: each example has it as alone."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import padfree_patch
from helpers.any_decoder import CONFIGS, maker
from helpers.models import assert_exact
from padfree_patch import PadfreeError, versions
from padfree_patch.any_decoder.cutting import Cutter, OfEach
from padfree_patch.batch.packed_batch import PackedBatch
from padfree_patch.batch.sequences import PackedSequences
from padfree_patch.testing import conformance, examples, pack
from padfree_patch.verification.untouched import states_put_back

pytestmark = pytest.mark.versions

LENGTHS = (12, 40, 9, 24, 3)
"""Around 16, the length from which rotaries change."""

ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
SCALED = {
    "dynamic": {**ROPE, "rope_type": "dynamic"},
    "longrope": {
        **ROPE, "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [3.0, 4.0, 5.0, 6.0],
    },
}  # fmt: skip
LONGEST = {"dynamic": 16, "longrope": 64}


def assert_shows(make, wider, texts):
    """The control: what depends on the length shows in these examples. Returns the logits of each alone."""
    alone = conformance.logits_alone(make, texts)
    assert conformance.largest(conformance.logits_alone(wider, texts) - alone) > 1e-3
    return alone


@pytest.mark.parametrize("kind", SCALED)
def test_rotary_that_takes_the_type_of_a_layer_rotates_each_example_by_its_own_length(kind):
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    types = {"sliding_attention": plain, "full_attention": SCALED[kind]}
    make = maker("gemma3_text", rope_parameters=types, max_position_embeddings=LONGEST[kind])
    rotary = next(each for each in make().modules() if "Rotary" in type(each).__name__)
    if "layer_type" not in inspect.signature(type(rotary).forward).parameters:
        pytest.skip("this version has a rotary for each type")
    texts = examples(LENGTHS)
    alone = assert_shows(make, maker("gemma3_text", rope_parameters=dict.fromkeys(types, plain)), texts)
    assert_exact(padfree_patch.apply(make()), pack(texts), alone)


@pytest.mark.skipif(versions.transformers("<5.0"), reason="rope_parameters came with 5.0")
@pytest.mark.parametrize("kind", ["llama4_text", "deepseek_v2"])
def test_rotary_that_gives_complex_numbers_rotates_each_example_by_its_own_length(kind):
    config = {"llama4_text": CONFIGS["llama4_text"], "deepseek_v2": {**CONFIGS["deepseek_v3"], "topk_method": "greedy"}}
    make, plain = (
        maker(kind, **{**config[kind], "rope_parameters": rope, "max_position_embeddings": 16})
        for rope in (SCALED["dynamic"], {"rope_type": "default", "rope_theta": 10000.0})
    )
    texts = examples(LENGTHS)
    assert_exact(padfree_patch.apply(make()), pack(texts), assert_shows(make, plain, texts))


def test_rotary_inside_of_what_runs_on_each_sequence_remembers_no_other():
    """GPT-NeoX has one in every attention until 4.47, whose tables grow and never shrink."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vocabulary = {name: CONFIGS["gpt2"][name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    config = {**small, **vocabulary, "rotary_pct": 1.0, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    grows = {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16}
    make = maker("gpt_neox", **config, **grows)
    texts = examples(LENGTHS)
    alone = assert_shows(make, maker("gpt_neox", **config, max_position_embeddings=128), texts)
    model = padfree_patch.apply(make())
    for _ in range(2):
        assert_exact(model, pack(texts), alone)


class Grows(nn.Module):
    """Keeps a table of the longest text so far, as another buffer, and its length under a new name."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(2))
        self.kept = None

    def forward(self, tokens):
        self.register_buffer("table", torch.zeros(tokens))
        self.longest, self.kept = tokens, torch.ones(tokens)


def test_states_that_a_call_leaves_are_put_back():
    module = Grows()
    before = {**vars(module)}, module.table
    with states_put_back(module):
        module(5)
        assert module.longest == len(module.table) == len(module.kept) == 5
    assert vars(module) == before[0]
    assert module.table is before[1]


SHARED_CHOICE = {
    **CONFIGS["deepseek_v3"], "index_topk": 12, "index_head_dim": 16, "index_n_heads": 2, "first_k_dense_replace": 2,
    "indexer_types": ["full", "shared"], "mlp_layer_types": ["dense", "dense"],
}  # fmt: skip


@pytest.mark.parametrize("lengths", [(30, 20, 7), (5, 9), (30, 20)], ids=str)
def test_later_layers_use_the_keys_that_were_chosen_for_each_example(lengths):
    """Of an example shorter than `index_topk` all are chosen, so that what is chosen has another size for each."""
    make = maker("glm_moe_dsa", **SHARED_CHOICE)
    texts = examples(lengths)
    alone = conformance.logits_alone(make, texts)
    if max(lengths) > 12:  # the control
        assert_shows(make, maker("glm_moe_dsa", **{**SHARED_CHOICE, "index_topk": 64}), texts)
    assert_exact(padfree_patch.apply(make()), pack(texts), alone)


def test_only_what_was_chosen_is_handed_on_in_parts():
    """Other results that can't be joined, such as weights, nobody asked for."""
    sequences = PackedSequences.from_lengths([5, 2])
    cutter = Cutter(PackedBatch(sequences, sequences.position_ids()[None]), nn.Identity())
    output = [torch.ones(1, n, 3) for n in (5, 2)]
    chosen = [torch.zeros(1, n, n, dtype=torch.int32) for n in (5, 2)]
    weights = [torch.ones(1, n, n) for n in (5, 2)]
    joined = cutter.join(list(zip(output, chosen, weights)))
    assert isinstance(joined[1], OfEach)
    assert joined[2] is None
    parts = cutter.run({"chosen": joined[1]}, lambda cut: cut["chosen"])
    assert all(part is each for part, each in zip(parts, chosen))


def test_model_that_a_short_call_makes_another_is_refused_and_put_back():
    """BigBird's sparse attention sees later tokens too, and becomes a full one in its first call that is too short."""
    config = {name: SHARED_CHOICE[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    config |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    make = maker("big_bird", is_decoder=True, **config)
    model, kinds = make(), [type(each) for each in make().modules()]
    with pytest.raises(PadfreeError, match=r"attention_type went from 'block_sparse' to 'original_full'.*config"):
        padfree_patch.apply(model)
    assert [type(each) for each in model.modules()] == kinds
    model(**pack(examples((9,))), use_cache=False)
    assert [type(each) for each in model.modules()] != kinds  # the control
    padfree_patch.apply(maker("big_bird", is_decoder=True, attention_type="original_full", **config)())
