"""A text classifier on packed rows, with its accuracy on held-out texts.

    python examples/classifier.py MODEL DATA.jsonl OUT

A line of DATA is {"text": "...", "label": 2}; labels are 0, 1, 2 and so on.
"""

import sys

import datasets
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import padfree_patch

MODEL, DATA, OUT = sys.argv[1:]

texts = datasets.Dataset.from_json(DATA)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=max(texts["label"]) + 1)
padfree_patch.apply(model)

examples = texts.map(lambda row: {"input_ids": tokenizer(row["text"])["input_ids"]}, remove_columns=["text"])
parts = examples.train_test_split(test_size=0.25, seed=0)


def accuracy(predictions):
    return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}


trainer = Trainer(
    model=model,
    args=TrainingArguments(
        OUT,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        num_train_epochs=1,
        logging_steps=1,
        report_to=[],
    ),
    train_dataset=parts["train"],
    eval_dataset=parts["test"],
    data_collator=padfree_patch.DataCollatorForSequenceClassification(),
    compute_metrics=accuracy,
    callbacks=[padfree_patch.PaddingFreeCallback()],
)
trainer.train()
print(trainer.evaluate())
trainer.save_model()
