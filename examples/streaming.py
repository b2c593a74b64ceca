"""Training on a stream that is never read as a whole.

    python examples/streaming.py MODEL DATA.jsonl OUT

A line of DATA is {"text": "..."}. Each process reads the stream for itself (`dispatch_batches=False`): dealt out by one
process, rows of several examples would be torn apart.
"""

import sys

import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import padfree_patch

MODEL, DATA, OUT = sys.argv[1:]

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL)
padfree_patch.apply(model)

stream = datasets.load_dataset("json", data_files=DATA, split="train", streaming=True)
examples = stream.shuffle(seed=0, buffer_size=1000).map(
    lambda row: {"input_ids": [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]}, remove_columns=["text"]
)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        OUT,
        per_device_train_batch_size=4,
        max_steps=3,  # a stream has no length
        logging_steps=1,
        report_to=[],
        accelerator_config={"dispatch_batches": False},
    ),
    train_dataset=examples,
    data_collator=padfree_patch.DataCollatorWithFlattening(),
    callbacks=[padfree_patch.PaddingFreeCallback()],
)
trainer.train()
trainer.save_model()
