"""A reward model: one score for each answer, all answers of a batch in one row.

    python examples/reward_model.py MODEL DATA.jsonl OUT

A line of DATA is {"prompt": "...", "chosen": "...", "rejected": "..."}.
"""

import sys

import datasets
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import padfree_patch

MODEL, DATA, OUT = sys.argv[1:]

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=1)
padfree_patch.apply(model)


def tokenised(row):
    texts = {f"{answer}_ids": f"{row['prompt']} {row[answer]}" for answer in ("chosen", "rejected")}
    return {name: tokenizer(text)["input_ids"] for name, text in texts.items()}


class RewardTrainer(Trainer):
    """Wants a higher score for the chosen answer of each pair."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs.pop("labels")  # of tokens
        outputs = model(**inputs)
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)  # a score for each answer
        loss = -logsigmoid(chosen - rejected).mean()
        if num_items_in_batch is not None:  # a Trainer (from 4.46 on) that leaves this to the loss
            loss = loss / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


pairs = datasets.Dataset.from_json(DATA)
trainer = RewardTrainer(
    model=model,
    args=TrainingArguments(
        OUT,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        learning_rate=1e-5,
        logging_steps=1,
        remove_unused_columns=False,
        report_to=[],
    ),
    train_dataset=pairs.map(tokenised, remove_columns=pairs.column_names),
    data_collator=padfree_patch.DataCollatorForPreference(),
    callbacks=[padfree_patch.PaddingFreeCallback()],
)
trainer.train()
trainer.save_model()
