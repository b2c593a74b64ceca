"""Promise 2: bad input is a PadfreeError that says what was found, and nothing has changed or is lost afterwards."""

from __future__ import annotations

import pytest
import torch
import transformers

import padfree_patch
from padfree_patch import PackedSequences, PadfreeError
from padfree_patch.testing import examples, pack
from padfree_patch.testing.ordinary import cache_argument

pytestmark = pytest.mark.versions


@pytest.fixture
def batch():
    return pack(examples((5, 4)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_ids": torch.zeros(1, 8, dtype=torch.int64)}, r"shape \(1, 8\), but the tokens have \(1, 9\)"),
        ({"position_ids": torch.zeros(9, dtype=torch.int64)}, r"shape \(9,\), but the tokens have \(1, 9\)"),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 8])}, "cover 8 tokens, but the batch has 9"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 9])}, r"disagree .* \(\(5, 4\) against \(4, 5\)\)"),
        (
            {"position_ids": None, "cu_seq_lens_q": torch.tensor([0, 4, 9]), "attention_mask": torch.zeros(1, 1, 9, 9)},
            r"attention_mask is \(1, 1, 9, 9\) instead of \(1, 9\)",
        ),
        ({"packed_sequences": PackedSequences.from_lengths([5, 5])}, "cover 10 tokens, but the batch has 9"),
        ({"max_length_q": 5}, "without cu_seq_lens_q"),
        ({"attention_mask": torch.tensor([[1] * 4 + [2] * 5])}, "disagree in row 0 between tokens 3 and 4"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1, 1]])}, "a 0 inside a sequence"),
        ({"attention_mask": torch.ones(1, 7, dtype=torch.int64)}, r"attention_mask is \(1, 7\) instead of \(1, 9\)"),
        ({"output_attentions": True}, "output_attentions"),
        ({"labels": torch.zeros(1, 8, dtype=torch.int64)}, r"labels have shape \(1, 8\)"),
        (
            {"input_ids": torch.zeros(1, 0, dtype=torch.int64), "cu_seq_lens_q": torch.tensor([0, 5, 9])},
            r"empty input, the tokens have shape \(1, 0\)",
        ),
    ],
)
def test_bad_call_is_an_error_that_shows_what_it_got_and_the_next_call_is_right(make, batch, change, message):
    with padfree_patch.applied(make()) as model:
        before = model(**batch).logits
        with pytest.raises(PadfreeError, match=message):
            model(**{**batch, **change})
        assert torch.equal(model(**batch).logits, before)


def test_packed_row_with_a_filled_cache_is_refused(make, batch):
    (prompt,) = examples((4,))
    with padfree_patch.applied(make()) as model:
        name = cache_argument(model)
        cache = {name: model(input_ids=prompt, use_cache=True)[name]}
        for how in ({}, {"position_ids": None, "cu_seq_lens_q": torch.tensor([0, 5, 9])}):
            with pytest.raises(PadfreeError, match="a cache that holds 4 tokens"):
                model(**{**batch, **how}, **cache)
        following = model(input_ids=prompt[:, :1], **cache, position_ids=torch.tensor([[4]])).logits
        assert following.shape[1] == 1


def test_sequence_over_two_rows_is_refused(llama):
    ids = torch.cat(examples((6, 6)))
    with padfree_patch.applied(llama), pytest.raises(PadfreeError, match="runs from row 0 into row 1"):
        llama(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 5, 12]))


def test_heads_whose_result_is_of_all_tokens_of_a_row_refuse_a_packed_row(llama, batch):
    if not hasattr(transformers, "LlamaForQuestionAnswering"):
        pytest.skip(f"transformers {transformers.__version__} has no LlamaForQuestionAnswering")
    model = transformers.LlamaForQuestionAnswering(llama.config)
    with padfree_patch.applied(model):  # verify looks at the decoder
        with pytest.raises(PadfreeError, match="makes its result of all tokens of a row"):
            model(**batch)
        model(input_ids=batch["input_ids"])


def test_head_over_a_decoder_that_is_not_patched_refuses_a_packed_row(llama, batch):
    with padfree_patch.applied(llama):
        llama.model = type(llama.model)(llama.config)
        with pytest.raises(PadfreeError, match="LlamaForCausalLM is patched, but the LlamaModel in it is not"):
            llama(**batch)


def test_python_errors_stay_python_errors(llama, batch):
    with padfree_patch.applied(llama), pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        llama(batch["input_ids"], **batch)


def test_what_is_no_transformers_model_is_named():
    for model, message in [
        (torch.nn.Linear(2, 2), "Linear is not a transformers model and holds none"),
        ("llama", "expected a transformers model, found str"),
    ]:
        with pytest.raises(PadfreeError, match=message):
            padfree_patch.apply(model)
    for call in (padfree_patch.verify, padfree_patch.restore, lambda model: padfree_patch.applied(model).__enter__()):
        with pytest.raises(PadfreeError, match="expected a transformers model, found str"):
            call("llama")


def test_what_is_no_batch_is_named(llama):
    with pytest.raises(PadfreeError, match=r"a batch to verify must have input_ids \(B, T\), found list"):
        padfree_patch.verify(llama, [1, 2])


def test_unknown_backend_is_refused_with_all_candidates(llama):
    with pytest.raises(PadfreeError) as caught:
        padfree_patch.apply(llama, backend="sdap")
    assert "unknown backend 'sdap'" in str(caught.value)
    assert "flash_attn: " in str(caught.value)
    assert "sdpa: works" in str(caught.value)
    assert not padfree_patch.patching.is_applied(llama)


def test_backend_that_cannot_serve_is_refused_and_rolled_back(llama):
    with pytest.raises(PadfreeError, match="backend 'flash_attn' can't serve dtype=float32, device=cpu, head_dim=8"):
        padfree_patch.apply(llama, backend="flash_attn")
    assert not padfree_patch.patching.is_applied(llama)
