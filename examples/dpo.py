"""DPO with all answers of a batch in one row, and a frozen copy of the model as reference.

    python examples/dpo.py MODEL DATA.jsonl OUT

A line of DATA is {"prompt": "...", "chosen": "...", "rejected": "..."}.
"""

import copy
import sys

import datasets
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import padfree_patch

MODEL, DATA, OUT = sys.argv[1:]
BETA = 0.1

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL)
padfree_patch.apply(model)
reference = copy.deepcopy(model).eval().requires_grad_(False)  # patched like its original


def answer(text):
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def tokenised(row):
    prompt = tokenizer(row["prompt"])["input_ids"]
    return {"prompt_ids": prompt, "chosen_ids": answer(row["chosen"]), "rejected_ids": answer(row["rejected"])}


class DPOTrainer(Trainer):
    """Compares how much likelier the model finds each answer than the reference does."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, sequences = inputs.pop("labels"), inputs["packed_sequences"]
        outputs = model(**inputs)
        gains = padfree_patch.sequence_log_probs(outputs.logits, labels, sequences)
        with torch.no_grad():
            gains -= padfree_patch.sequence_log_probs(reference(**inputs).logits, labels, sequences)
        chosen, rejected = gains.chunk(2)
        loss = -logsigmoid(BETA * (chosen - rejected)).mean()
        if num_items_in_batch is not None:  # a Trainer (from 4.46 on) that leaves this to the loss
            loss = loss / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


pairs = datasets.Dataset.from_json(DATA)
trainer = DPOTrainer(
    model=model,
    args=TrainingArguments(
        OUT,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        learning_rate=5e-7,
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
