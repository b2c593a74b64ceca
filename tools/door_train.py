"""A training script as people have it: a Trainer, a model that it makes itself, and a collator that flattens.

python tools/door_train.py FOLDER OUTPUT, on texts that tools/door_assets.py wrote; the runs of tools/door.py start it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import transformers

try:
    from transformers import DataCollatorWithFlattening  # from 4.44 on
except ImportError:
    from padfree_patch import DataCollatorWithFlattening  # before it, nothing says where examples end


def main(folder: Path, output: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    texts = [json.loads(line)["text"] for line in (folder / "trl" / "train.jsonl").read_text().splitlines()]
    examples = [{"input_ids": [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]} for text in texts]
    transformers.set_seed(0)
    trainer = transformers.Trainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="sdpa"),
        args=transformers.TrainingArguments(
            output,
            per_device_train_batch_size=3,
            max_steps=3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
        ),
        train_dataset=examples,
        data_collator=DataCollatorWithFlattening(),
    )
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
