"""The recipes in examples/ run as they stand, and their first step is that of each example alone, unpatched."""

from __future__ import annotations

import datasets
import pytest
import torch
from torch.nn.functional import log_softmax, logsigmoid
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainingArguments

from helpers.recipes import (
    EXAMPLES,
    assert_is_step_of,
    first_step_recorded,
    language_loss,
    run,
    save_tiny_model,
    sentence,
)
from padfree_patch import unpack

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROWS = range(12)
PAIRS = [{"prompt": sentence(i, 1 + i % 5), "completion": sentence(i + 3, 1 + i % 4)} for i in ROWS]
TEXTS = [{"text": sentence(i, 3 + 5 * (i % 4))} for i in ROWS]
CHATS = [
    {"messages": [{"role": role, "content": sentence(i, 1 + i % 3)} for role in ("user", "assistant") * (1 + i % 2)]}
    for i in ROWS
]
ANSWERS = [{"prompt": sentence(i, 2), "chosen": sentence(i, 1 + i % 5), "rejected": sentence(i + 2, 3)} for i in ROWS]
LABELLED = [{"text": sentence(i, 1 + i % 7), "label": i % 3} for i in range(24)]
LANGUAGE = {
    "sft_prompt_completion.py": PAIRS,
    "sft_chat.py": CHATS,
    "streaming.py": TEXTS,
    "token_budget.py": TEXTS,
    "continued_pretraining.py": TEXTS,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a tokenizer, on disk."""
    place = tmp_path_factory.mktemp("model")
    save_tiny_model(place, TEMPLATE)
    return place


@pytest.fixture(autouse=True)
def _caches(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def alone(folder):
    """The model as it is without this package."""
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", LANGUAGE)
def test_recipe_of_a_language_model_is_exact(name, folder, alone, tmp_path):
    if name == "streaming.py" and not hasattr(TrainingArguments, "accelerator_config"):
        pytest.skip("examples/README.md: it needs transformers 4.38")
    with first_step_recorded() as steps:
        trainer = run(name, folder, LANGUAGE[name], tmp_path)["trainer"]
    assert len(steps[0].examples) > 1
    assert any("padding_saved" in each for each in trainer.state.log_history)
    labels = unpack(steps[0].batch["labels"], steps[0].sequences)
    assert_is_step_of(steps[0], alone, language_loss(alone, steps[0].examples, labels))
    assert (tmp_path / "out" / "config.json").exists()
    naive = language_loss(alone, [torch.cat(steps[0].examples)], [torch.cat(labels)])  # the control
    assert abs(naive.item() - steps[0].loss) > 1e-4


def test_chat_trains_the_answers_only(folder, tmp_path):
    with first_step_recorded() as steps:
        tokenizer = run("sft_chat.py", folder, CHATS, tmp_path)["tokenizer"]
    for ids, labels in zip(steps[0].examples, unpack(steps[0].batch["labels"], steps[0].sequences)):
        turns = tokenizer.decode(ids).split("<assistant>")[1:]
        assert tokenizer.decode(labels[labels != -100]) == "".join(
            turn.partition("<end>")[0] + "<end>" for turn in turns
        )


def test_lora_is_exact(folder, alone, tmp_path):
    pytest.importorskip("peft", minversion="0.8", reason="examples/README.md: it needs peft 0.8")
    with first_step_recorded() as steps:
        run("lora.py", folder, PAIRS, tmp_path)
    labels = unpack(steps[0].batch["labels"], steps[0].sequences)
    expected = language_loss(alone, steps[0].examples, labels)  # adapters add nothing yet
    torch.testing.assert_close(steps[0].loss, expected.item(), rtol=2e-5, atol=2e-5)
    naive = language_loss(alone, [torch.cat(steps[0].examples)], [torch.cat(labels)])
    assert abs(naive.item() - steps[0].loss) > 1e-4
    assert all("lora" in name for name in steps[0].gradients)
    assert (tmp_path / "out" / "adapter_config.json").exists()


def log_probs(model, ids, labels):
    """Sums the log-probabilities of an example's labels."""
    found = log_softmax(model(input_ids=ids[None]).logits[0, :-1].float(), -1)
    trained = labels[1:] != -100
    return found[trained].gather(1, labels[1:][trained][:, None]).sum()


def test_dpo_is_exact(folder, alone, tmp_path):
    with first_step_recorded() as steps:
        run("dpo.py", folder, ANSWERS, tmp_path)
    (step,) = steps
    labels = unpack(step.batch["labels"], step.sequences)
    gains = torch.stack([log_probs(alone, *each) for each in zip(step.examples, labels)])
    chosen, rejected = (gains - gains.detach()).chunk(2)  # the reference is the model as it began
    assert_is_step_of(step, alone, -logsigmoid(0.1 * (chosen - rejected)).mean())
    row = alone(input_ids=step.batch["input_ids"]).logits  # the control: without boundaries
    assert not torch.allclose(row[0, -1], alone(input_ids=step.examples[-1][None]).logits[0, -1], atol=1e-4)


@pytest.mark.parametrize(("name", "rows"), [("reward_model.py", ANSWERS), ("classifier.py", LABELLED)])
def test_scores_on_packed_rows_are_exact(name, rows, folder, tmp_path, monkeypatch):
    torch.manual_seed(1)
    labels = 1 if rows is ANSWERS else 3
    made = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    made.save_pretrained(tmp_path / "model")  # with its head: the recipe loads the same
    for file in folder.glob("tokenizer*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    with first_step_recorded() as steps:
        trainer = run(name, tmp_path / "model", rows, tmp_path)["trainer"]
    step, alone = steps[0], AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    scores = torch.cat([alone(input_ids=ids[None]).logits for ids in step.examples])
    if rows is ANSWERS:
        chosen, rejected = scores.squeeze(-1).chunk(2)
        loss = -logsigmoid(chosen - rejected).mean()
    else:
        loss = torch.nn.functional.cross_entropy(scores, step.batch["labels"])
        (found,) = (each for each in trainer.state.log_history if "eval_accuracy" in each)
        assert found["eval_accuracy"] * len(trainer.eval_dataset) == pytest.approx(right_ones(trainer), abs=1e-6)
    assert_is_step_of(step, alone, loss)
    row = alone(input_ids=step.batch["input_ids"]).logits  # the control: one score for the row, of mixed examples
    assert len(row) == 1 and not torch.allclose(row[0], scores[-1], atol=1e-4)


def right_ones(trainer) -> int:
    """Counts the held-out examples that the trained model labels rightly, each alone."""
    with torch.no_grad():
        model = trainer.model.eval()
        return sum(
            int(model(input_ids=torch.tensor([each["input_ids"]])).logits.argmax() == each["label"])
            for each in trainer.eval_dataset
        )


def test_metrics_are_of_each_example(folder, alone, tmp_path):
    rows = [*PAIRS[:5], {"prompt": "one", "completion": ""}]
    found = run("per_example_metrics.py", folder, rows, tmp_path, out=False)
    trainer = found["trainer"]
    metrics = trainer.evaluate()
    assert metrics["eval_examples"] == len(rows)
    right = [
        bool(
            (
                alone(input_ids=ids[None]).logits[0, :-1].argmax(-1)[wanted[1:] != -100]
                == wanted[1:][wanted[1:] != -100]
            ).all()
        )
        for ids, wanted in ((torch.tensor(e["input_ids"]), torch.tensor(e["labels"])) for e in trainer.eval_dataset)
    ]
    assert metrics["eval_exact_match"] == pytest.approx(sum(right) / len(right))


def test_every_recipe_is_run_and_listed():
    files = {path.name for path in EXAMPLES.glob("*.py")}
    assert files == {*LANGUAGE, "lora.py", "dpo.py", "reward_model.py", "classifier.py", "per_example_metrics.py"}
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"]({name})" in listed for name in files)
