"""Supervised fine-tuning on conversations; the loss is on the assistant's turns only.

    python examples/sft_chat.py MODEL DATA.jsonl OUT

MODEL must have a chat template. A line of DATA is {"messages": [{"role": "user", "content": "..."}, ...]}.
"""

import sys

import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import padfree_patch

MODEL, DATA, OUT = sys.argv[1:]

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL)
padfree_patch.apply(model)


def pieces(messages):
    """Yields the text of the conversation piece by piece, and whether the assistant wrote it."""
    done = ""
    for end, message in enumerate(messages, 1):
        answers = message["role"] == "assistant"
        ends = [(messages[: end - 1], True)] * answers + [(messages[:end], False)]  # an answer begins after its header
        for number, (until, header) in enumerate(ends):
            text = tokenizer.apply_chat_template(until, tokenize=False, add_generation_prompt=header)
            if not text.startswith(done):
                raise ValueError("this chat template changes earlier turns, so a conversation has no pieces")
            yield text[len(done) :], answers and number == 1
            done = text


def tokenised(row):
    example = {"input_ids": [], "labels": []}
    for text, trained in pieces(row["messages"]):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        example["input_ids"] += ids
        example["labels"] += ids if trained else [-100] * len(ids)
    return example


chats = datasets.Dataset.from_json(DATA)
trainer = Trainer(
    model=model,
    args=TrainingArguments(OUT, per_device_train_batch_size=8, num_train_epochs=1, logging_steps=1, report_to=[]),
    train_dataset=chats.map(tokenised, remove_columns=chats.column_names),
    data_collator=padfree_patch.DataCollatorWithFlattening(),
    callbacks=[padfree_patch.PaddingFreeCallback()],
)
trainer.train()
trainer.save_model()
