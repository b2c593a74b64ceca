"""Supervised fine-tuning on raw prompts and completions; the loss is on the completions only.

    python examples/sft_prompt_completion.py MODEL DATA.jsonl OUT

MODEL is a folder or a name on the hub. A line of DATA is {"prompt": "...", "completion": "..."}.
"""

import sys

import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import padfree_patch

MODEL, DATA, OUT = sys.argv[1:]

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL)
padfree_patch.apply(model)


def tokenised(row):
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


texts = datasets.Dataset.from_json(DATA)
trainer = Trainer(
    model=model,
    args=TrainingArguments(OUT, per_device_train_batch_size=8, num_train_epochs=1, logging_steps=1, report_to=[]),
    train_dataset=texts.map(tokenised, remove_columns=texts.column_names),
    data_collator=padfree_patch.DataCollatorWithFlattening(),
    callbacks=[padfree_patch.PaddingFreeCallback()],
)
trainer.train()
trainer.save_model()
