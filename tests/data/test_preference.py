"""Pairs in one packed row: DPO's loss, its gradients and a reward model's scores are those of each answer alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from helpers.comparison import gradients_apart
from padfree_patch import (
    DataCollatorForPreference,
    PadfreeError,
    applied,
    apply,
    last_tokens,
    sequence_log_probs,
)
from padfree_patch.testing import conformance

pytestmark = pytest.mark.versions


PAIRS = [((4, 9), (5, 7, 1), (6, 1)), ((8,), (3, 1), (2, 9, 9, 9, 1)), ((7, 7, 7), (9, 1), (4, 5, 1))]


def features(prompt="prompt_ids", chosen="chosen_ids", rejected="rejected_ids"):
    return [{prompt: list(each[0]), chosen: list(each[1]), rejected: list(each[2])} for each in PAIRS]


@pytest.mark.parametrize("ending", ["ids", "input_ids"])
def test_row_is_every_chosen_then_every_rejected_answer(ending):
    batch = DataCollatorForPreference()(features(*(f"{name}_{ending}" for name in ("prompt", "chosen", "rejected"))))
    texts = [[*prompt, *answer] for which in (1, 2) for prompt, answer in ((each[0], each[which]) for each in PAIRS)]
    assert batch["input_ids"].tolist() == [[token for text in texts for token in text]]
    assert batch["packed_sequences"].lengths == tuple(map(len, texts))
    trained = [label for which in (1, 2) for each in PAIRS for label in (*[-100] * len(each[0]), *each[which])]
    assert batch["labels"].tolist() == [trained]


def test_answers_that_hold_their_prompt_have_labels():
    """TRL 0.9.6's columns."""
    pairs = [
        {
            "prompt_input_ids": list(prompt),
            **{f"{name}_input_ids": [*prompt, *each] for name, each in zip(("chosen", "rejected"), answers)},
            **{f"{name}_labels": [*[-100] * len(prompt), *each] for name, each in zip(("chosen", "rejected"), answers)},
        }
        for prompt, *answers in PAIRS
    ]
    old, new = (DataCollatorForPreference()(each) for each in (pairs, features()))
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(old[name], new[name])


def test_fields_of_a_pair_are_stacked():
    pairs = [{**each, "ref_chosen_logps": -1.5 * i} for i, each in enumerate(features())]
    assert DataCollatorForPreference(pair_fields=["ref_chosen_logps"])(pairs)["ref_chosen_logps"].tolist() == [
        0,
        -1.5,
        -3,
    ]


def dpo(log_probs, reference, beta=0.5):
    """Equation 7 of Rafailov et al. 2023, the mean over pairs."""
    chosen, rejected = (log_probs - reference).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def log_probs_alone(model):
    """Of every answer after its prompt, chosen ones first, each through the model by itself."""
    found = []
    for which in (1, 2):
        for each in PAIRS:
            prompt, answer = each[0], each[which]
            logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
            found.append(sum(logits[len(prompt) + i - 1, token] for i, token in enumerate(answer)))
    return torch.stack(found)


def test_dpo_is_that_of_each_answer_alone(make, measured):
    model, reference = make(), torch.tensor([-9.0, -8, -7, -6, -5, -4])
    batch = DataCollatorForPreference()(features())
    sequences, labels = batch["packed_sequences"], batch.pop("labels")
    alone = copy.deepcopy(model)
    expected = dpo(log_probs_alone(alone), reference)
    expected.backward()
    with applied(model):
        loss = dpo(sequence_log_probs(model(**batch).logits, labels, sequences), reference)
        loss.backward()
    torch.testing.assert_close(loss, expected)
    gradients = [{name: p.grad for name, p in each.named_parameters()} for each in (model, alone)]
    apart = gradients_apart(*gradients)
    assert apart <= conformance.GRADIENT_TOLERANCE
    measured("DPO on packed pairs", steps=1, loss=abs(loss - expected).item(), gradients=apart)
    mixed = dpo(sequence_log_probs(copy.deepcopy(model)(batch["input_ids"]).logits, labels, sequences), reference)
    assert abs(mixed - expected) > 1e-3  # the control: one text, unpatched


def test_scores_of_whole_texts_without_a_prompt(make):
    """As reward models are trained: what both answers hold, and a head on their last tokens."""
    texts = [
        {name: [*prompt, *answer] for name, answer in zip(("chosen_ids", "rejected_ids"), answers)}
        for prompt, *answers in PAIRS
    ]
    model, head = make(), torch.arange(80.0)
    batch = DataCollatorForPreference()(texts)
    del batch["labels"]
    with torch.no_grad(), applied(model):
        scores = last_tokens(model(**batch).logits, batch["packed_sequences"])[:, :80] @ head
    with torch.no_grad():
        alone = [
            model(input_ids=torch.tensor([row[name]])).logits[0, -1, :80] @ head
            for name in ("chosen_ids", "rejected_ids")
            for row in texts
        ]
    torch.testing.assert_close(scores, torch.stack(alone), rtol=1e-4, atol=1e-4)  # 80 products of up to 80


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ({"prompt_ids": [1], "chosen_ids": [2]}, "pair 1 has no rejected_ids; it has prompt_ids, chosen_ids"),
        (
            {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2], "chosen_labels": [2]},
            "pair 1 of 2 has chosen_labels only; give those of both answers",
        ),
        (
            {"prompt_ids": [1], "chosen_ids": [2, 0], "rejected_ids": [2], "chosen_attention_mask": [1, 0]},
            "pair 1: chosen is padded by 1 tokens",
        ),
        ([1, 2], "example 1 must be a dict of fields"),
        ({"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [2]}, "pair 1 of 2 has an empty chosen answer"),
        ({"chosen_ids": [1], "rejected_ids": [2]}, "pair 1 of 2: a prompt in some pairs only"),
        ({"prompt_ids": [1], "chosen_ids": "no", "rejected_ids": [2]}, r"example 1: chosen_ids must be integers"),
    ],
)
def test_pairs_that_cannot_be_collated_are_errors(pair, message):
    with pytest.raises(PadfreeError, match=message):
        DataCollatorForPreference()([features()[0], pair])


def test_options_that_break_the_halves_are_errors():
    for option in ({"max_tokens": 8}, {"pad_to_multiple_of": 8}, {"example_fields": ["score"]}, {"separator_id": 1}):
        with pytest.raises(PadfreeError, match="the first half of a row's sequences must be the chosen ones"):
            DataCollatorForPreference(**option)
    with pytest.raises(PadfreeError, match="no pairs to collate"):
        DataCollatorForPreference()([])


def test_columns_of_a_row_per_answer_are_refused_in_words():
    """TRL's DPOTrainer asks for them; a loader's copies of the batch go on saying so."""
    batch = DataCollatorForPreference()(features())
    for name in ("completion_mask", "chosen_input_ids"):
        with pytest.raises(PadfreeError, match=f"for {name}, a row per answer, but all answers are in one row"):
            type(batch)({key: value for key, value in batch.items()})[name]
    assert batch.get("completion_mask") is None and "completion_mask" not in batch
    with pytest.raises(KeyError, match="other"):
        batch["other"]


def test_fields_of_a_pair_that_are_left_out_are_named_once():
    collator = DataCollatorForPreference(pair_fields=["margin"])
    pairs = [{**each, "margin": 1.0, "score": 2.0, "prompt": "text"} for each in features()]
    with pytest.warns(UserWarning, match="leaves out score: name fields with a value per pair in pair_fields="):
        collator(pairs)
    collator(iter(pairs))  # a second warning would be an error
    with pytest.raises(PadfreeError, match="pair_fields must be a list of names"):
        DataCollatorForPreference(pair_fields="margin")


class DPOTrainer(Trainer):
    """docs/training.md's, with a reference that gives every answer the same."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, sequences = inputs.pop("labels"), inputs["packed_sequences"]
        loss = dpo(sequence_log_probs(model(**inputs).logits, labels, sequences), 0)
        return loss if num_items_in_batch is None else loss / self.args.gradient_accumulation_steps


def test_accumulated_dpo_steps_are_those_of_one_batch(llama, tmp_path):
    def moved(batch_size, accumulate):
        model = apply(copy.deepcopy(llama))
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
            max_steps=1,
            learning_rate=1.0,
            optim="sgd",
            max_grad_norm=0.0,
            remove_unused_columns=False,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
        )
        pairs = (features() * 2)[:4]
        DPOTrainer(model=model, args=arguments, train_dataset=pairs, data_collator=DataCollatorForPreference()).train()
        return torch.cat([(a - b).detach().flatten() for a, b in zip(model.parameters(), llama.parameters())])

    whole, accumulated = moved(4, 1), moved(2, 2)
    assert whole.norm() > 0 and (accumulated - whole).norm() <= 1e-4 * whole.norm()  # sums in another order
