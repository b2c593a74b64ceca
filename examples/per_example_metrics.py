"""Metrics of each example on packed rows: `compute_metrics` sees what it would see of padded batches.

    python examples/per_example_metrics.py MODEL DATA.jsonl

A line of DATA is {"prompt": "...", "completion": "..."}. Prints how many completions the model gets right as a whole,
token by token.
"""

import sys

import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import padfree_patch

MODEL, DATA = sys.argv[1:]

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL)
padfree_patch.apply(model)


def tokenised(row):
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


class PerExampleTrainer(padfree_patch.PerExampleMetrics, Trainer):
    """Gives compute_metrics a row for each example."""


def exact_match(found):
    guesses, labels = found.predictions[:, :-1], found.label_ids[:, 1:]  # a token is guessed from those before it
    right = (guesses == labels) | (labels == -100)
    return {"examples": len(right), "exact_match": float(right.all(-1).mean())}


texts = datasets.Dataset.from_json(DATA)
trainer = PerExampleTrainer(
    model=model,
    args=TrainingArguments("out", per_device_eval_batch_size=8, report_to=[]),
    eval_dataset=texts.map(tokenised, remove_columns=texts.column_names),
    data_collator=padfree_patch.DataCollatorWithFlattening(),
    preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),  # instead of keeping all logits
    compute_metrics=exact_match,
)
print(trainer.evaluate())
