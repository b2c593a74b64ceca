"""Continued pre-training on documents: rows of one size, filled once, and long documents split.

    python examples/continued_pretraining.py MODEL DATA.jsonl OUT

A line of DATA is {"text": "..."}. No token attends to another document, unlike in texts that are joined and cut.
"""

import sys

import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import padfree_patch

MODEL, DATA, OUT = sys.argv[1:]
MAX_LENGTH = 64  # tokens of a row; thousands on a GPU

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL)
padfree_patch.apply(model)

texts = datasets.Dataset.from_json(DATA)
documents = texts.map(
    lambda row: {"input_ids": [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]},
    remove_columns=texts.column_names,
)
rows = padfree_patch.pack_dataset(documents, max_length=MAX_LENGTH, too_long="split")
trainer = Trainer(
    model=model,
    args=TrainingArguments(OUT, per_device_train_batch_size=1, num_train_epochs=1, logging_steps=1, report_to=[]),
    train_dataset=rows,
    data_collator=padfree_patch.DataCollatorWithFlattening(),
    callbacks=[padfree_patch.PaddingFreeCallback()],
)
trainer.train()
trainer.save_model()
