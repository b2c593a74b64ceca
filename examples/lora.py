"""LoRA on raw prompts and completions: apply works before or after get_peft_model.

    python examples/lora.py MODEL DATA.jsonl OUT

A line of DATA is {"prompt": "...", "completion": "..."}. Only the adapter is saved.
"""

import sys

import datasets
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import padfree_patch

MODEL, DATA, OUT = sys.argv[1:]

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL)
model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
padfree_patch.apply(model)


def tokenised(row):
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


texts = datasets.Dataset.from_json(DATA)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        OUT, per_device_train_batch_size=8, num_train_epochs=1, learning_rate=2e-4, logging_steps=1, report_to=[]
    ),
    train_dataset=texts.map(tokenised, remove_columns=texts.column_names),
    data_collator=padfree_patch.DataCollatorWithFlattening(),
    callbacks=[padfree_patch.PaddingFreeCallback()],
)
trainer.train()
trainer.save_model()
