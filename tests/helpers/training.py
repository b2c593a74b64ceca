"""Short trainings with transformers' Trainer on random examples, padded and padding-free."""

from __future__ import annotations

import copy

import torch
from transformers import Trainer, TrainingArguments

from helpers.comparison import LEARNING_RATE, Training
from padfree_patch import DataCollatorWithFlattening, apply, versions

LENGTHS = [5, 9, 2, 12, 7, 17, 3, 4, 6, 11, 2, 8, 13, 5, 9, 4, 6, 3, 10, 7]
COUNTS_FIRST_TOKENS = versions.inside(versions.transformers_version(), ">=4.46,<5.10")
"""Whether the Trainer divides by a number of labels in which those that nothing predicts are counted."""


def data():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(2, 80, (n,), generator=generator).tolist()} for n in LENGTHS]


def padding(features):
    """To the right, with a mask; labels as `DataCollatorForLanguageModeling` makes them."""
    ids = [torch.tensor(each["input_ids"]) for each in features]
    labels = [torch.tensor(each.get("labels", each["input_ids"])) for each in features]
    padded = torch.nn.utils.rnn.pad_sequence(ids, True)
    mask = (torch.arange(padded.shape[1]) < torch.tensor([[len(each)] for each in ids])).long()
    return {
        "input_ids": padded,
        "attention_mask": mask,
        "labels": torch.nn.utils.rnn.pad_sequence(labels, True, padding_value=-100),
    }


def trainer_of(model, folder, collator, *, dataset=None, callbacks=(), **options):
    arguments = TrainingArguments(
        str(folder),
        **{"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": LEARNING_RATE, "optim": "sgd", **options},
        per_device_eval_batch_size=8,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        max_grad_norm=0.0,  # or a wrong scale of the gradients would be hidden; nor would Adam show it
        save_strategy="no",
    )
    dataset = data() if dataset is None else dataset
    inputs = {"train_dataset": dataset, "eval_dataset": dataset, "data_collator": collator}
    return Trainer(model=model, args=arguments, callbacks=list(callbacks), **inputs)


def trained(model, folder, collator, *, patched, **options):
    """Losses as logged, the evaluation's loss, and the weights."""
    model = copy.deepcopy(model)
    if patched:
        apply(model)
    trainer = trainer_of(model, folder, collator, **options)
    trainer.train()
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    return Training(losses, trainer.evaluate()["eval_loss"], list(model.parameters()))


def flattening(**options):
    """Counts what the padded batch counts, in versions whose Trainer counts labels."""
    return DataCollatorWithFlattening(separator_id=None if COUNTS_FIRST_TOKENS else -100, **options)


class Stream(torch.utils.data.IterableDataset):
    """The examples of the data set as they come."""

    def __iter__(self):
        yield from data()
