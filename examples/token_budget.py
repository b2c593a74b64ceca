"""Rows of up to so many tokens instead of so many examples, on any number of processes.

    python examples/token_budget.py MODEL DATA.jsonl OUT
    torchrun --nproc-per-node 2 examples/token_budget.py MODEL DATA.jsonl OUT

A line of DATA is {"text": "..."}. All processes get the same number of batches, and those of one step cost about the
same attention, so that none waits for another.
"""

import sys

import datasets
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import padfree_patch

MODEL, DATA, OUT = sys.argv[1:]
MAX_TOKENS = 128  # of a row; thousands on a GPU

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL)
padfree_patch.apply(model)


class BudgetTrainer(Trainer):
    """Fills each process's rows by tokens."""

    def get_train_dataloader(self):
        ranks = {"num_replicas": self.args.world_size, "rank": self.args.process_index}
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        sampler = padfree_patch.TokenBudgetBatchSampler(lengths, max_tokens=MAX_TOKENS, **ranks)
        return DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator)


texts = datasets.Dataset.from_json(DATA)
examples = texts.map(
    lambda row: {"input_ids": [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id][:MAX_TOKENS]},
    remove_columns=texts.column_names,
)
trainer = BudgetTrainer(
    model=model,
    args=TrainingArguments(OUT, num_train_epochs=1, logging_steps=1, report_to=[]),
    train_dataset=examples,
    data_collator=padfree_patch.DataCollatorWithFlattening(),
    callbacks=[padfree_patch.PaddingFreeCallback()],  # tells the sampler the epoch, also after resuming
)
trainer.train()
trainer.save_model()
