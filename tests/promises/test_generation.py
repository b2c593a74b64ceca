"""While a model generates, nothing is packed: every decoding loop gives what it gives unpatched (promise 3)."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from padfree_patch import PackedSequences, PadfreeError, apply, restore, versions
from padfree_patch.registry import registry
from padfree_patch.seams.under_way import under_way
from padfree_patch.testing import examples, tiny_model
from padfree_patch.testing.ordinary import cache_argument

pytestmark = pytest.mark.versions

IDS = torch.cat(examples((7, 7)))

MASKS = {
    "none": None,
    "right": [[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]],
    "left": [[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
    "hole": [[1, 1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
    "holes": [[0, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]],
    "triangle": [[1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]],  # of transformers' own tests
}

LOOPS = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 2},
    "beams without a cache": {"num_beams": 2, "use_cache": False},
    "assisted": {"assisted": True},
    "static": {"cache_implementation": "static"},
    "hybrid": {"cache_implementation": "hybrid"},
}

MODELS = {
    "llama": {"implementation": "eager"},
    "qwen2": {"implementation": "sdpa", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
}


def model_of(name, **config):
    """Makes a model of which some layers have a window, for the masks that static caches get by kind of layer."""
    try:
        return tiny_model(registry().get(name), num_hidden_layers=2, **{**MODELS[name], **config})
    except Exception as error:
        pytest.skip(f"upstream has no such model here: {error!r}")


@pytest.fixture(scope="module", params=MODELS)
def models(request):
    """A model and its assistant, unpatched and patched."""
    plain = model_of(request.param), model_of(request.param, seed=5)
    return plain, tuple(apply(model, verify=False) for model in copy.deepcopy(plain))


def generated(model, assistant, mask, *, rows=2, **options):
    """Returns the tokens that a model generates, and their scores; or upstream's error."""
    options = {**options, "max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True}
    if options.pop("assisted", None):
        options["assistant_model"], rows = assistant, 1
    if mask is not None:
        options["attention_mask"] = torch.tensor(mask)[:rows]
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            found = model.generate(IDS[:rows], output_scores=True, **options)
    except PadfreeError:
        raise
    except Exception as error:  # upstream's, of what it can't do in this version
        return repr(error)
    return [found.sequences, *found.scores]


@pytest.mark.filterwarnings("ignore")  # of upstream, which advises against some of these prompts
@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop_gives_what_it_gives_unpatched(models, loop):
    plain, patched = models
    failing = []
    for padding, mask in MASKS.items():
        expected = generated(*plain, mask, **LOOPS[loop])
        found = generated(*patched, mask, **LOOPS[loop])
        if isinstance(expected, str):
            assert found == expected, padding
            failing.append(expected)
        else:
            torch.testing.assert_close(
                found, expected, rtol=0, atol=0, msg=lambda text, where=padding: f"{where}: {text}"
            )
    assert not under_way.generating
    if len(failing) == len(MASKS):
        pytest.skip(f"upstream fails unpatched, and the patched model alike: {failing[0][:80]}")


def test_a_call_outside_of_the_loops_is_read(llama):
    """The control: what `generate` of 5.15 on calls a model with, for a right-padded prompt and two new tokens."""
    call = {
        "input_ids": torch.cat(examples((9,))),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 0, 0, 1, 2]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0, 0, 1, 1]]),
    }
    with torch.no_grad():
        expected = llama(**call).logits[:, -1]
        assert not torch.equal(apply(llama)(**call).logits[:, -1], expected)


class Asked(transformers.LogitsProcessor):
    """Asks a model about a packed row while another one generates."""

    def __init__(self, model, row):
        self.model, self.row, self.found = model, row, []

    def __call__(self, input_ids, scores):
        self.found.append(self.model(**self.row).logits)
        return scores


def test_another_model_that_is_asked_meanwhile_takes_packed_rows(llama, batch):
    asked = Asked(apply(model_of("llama", seed=5)), batch)
    with torch.no_grad():
        expected = asked.model(**batch).logits
    apply(llama).generate(IDS[:1], max_new_tokens=1, pad_token_id=0, logits_processor=[asked])
    assert torch.equal(asked.found[0], expected)


def test_a_packed_prompt_is_refused(llama):
    sequences = PackedSequences.from_lengths([3, 4])
    with pytest.raises(PadfreeError, match=r"LlamaForCausalLM\.generate got packed_sequences"):
        apply(llama).generate(IDS[:1], packed_sequences=sequences)


def test_restore_gives_back_the_loops(llama, clean_start):
    before = dict(vars(transformers.GenerationMixin))
    apply(llama)
    assert vars(transformers.GenerationMixin)["generate"] is not before["generate"]
    restore(llama)
    assert dict(vars(transformers.GenerationMixin)) == before


@pytest.mark.skipif(versions.transformers("<4.36"), reason="this version has no cache class")
def test_a_packed_row_with_an_empty_cache_is_packed(make, batch, alone):
    """Only a cache that holds tokens means that a model generates."""
    model, sequences = apply(make()), PackedSequences.from_position_ids(batch["position_ids"])
    lengths = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
    lengths |= {"cu_seq_lens_q": sequences.cu_seqlens, "max_length_q": sequences.max_seqlen}
    for packed in (batch, lengths, {**batch, "attention_mask": lengths["attention_mask"]}):
        with torch.no_grad():
            found = model(**packed, **{cache_argument(model): transformers.DynamicCache()}).logits
        torch.testing.assert_close(found, alone)


@pytest.mark.skipif(versions.transformers("<4.53"), reason="this version has no continuous batching")
def test_calls_of_continuous_batching_are_upstreams(llama, batch):
    """Its thread packs requests into a row, says where their keys go in its cache, and brings its own attention."""
    call = {**batch, "write_index": [torch.arange(batch["input_ids"].shape[1])]}
    with torch.no_grad():
        expected = llama(**call).logits
        assert torch.equal(apply(llama)(**call).logits, expected)
        assert not torch.equal(llama(**batch).logits, expected)  # the control: this row is packed
