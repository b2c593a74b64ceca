"""Writes what the runs of tools/door.py train: a tiny model, its tokenizer, and texts in each tool's form.

python tools/door_assets.py FOLDER [ARCHITECTURE], in the environment of the tool, which then can load them.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import tokenizers
import transformers

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
WORDS = [*NUMBERS, "red", "green", "blue", "small", "large", "fast", "slow", "up", "down", "left", "right"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"


def make_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    """Writes a byte-level tokenizer, whose padding and end tokens are the last of its vocabulary, and no text's."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(WORDS, tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    made.add_special_tokens(["<pad>", "<end>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(folder: Path, architecture: str, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    config = transformers.AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,  # large enough that what mixes shows
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.set_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def write_texts(folder: Path) -> None:
    generator = random.Random(0)
    pairs = [(words(generator, 6), words(generator, 20)) for _ in range(96)]
    (folder / "trl").mkdir(parents=True)
    (folder / "trl" / "train.jsonl").write_text("".join(json.dumps({"text": f"{a} {b}"}) + "\n" for a, b in pairs))
    turns = [{"instruction": a, "input": "", "output": b} for a, b in pairs]
    (folder / "llamafactory").mkdir()
    (folder / "llamafactory" / "texts.json").write_text(json.dumps(turns))
    (folder / "llamafactory" / "dataset_info.json").write_text(json.dumps({"texts": {"file_name": "texts.json"}}))
    chats = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in pairs]
    (folder / "chats.jsonl").write_text("".join(json.dumps(each) + "\n" for each in chats))


def write_configs(folder: Path) -> None:
    """Writes the config of axolotl, without our plug-in and with it."""
    config = {
        **{"base_model": str(folder / "model"), "sequence_len": 128, "sample_packing": True},
        "datasets": [{"path": str(folder / "trl" / "train.jsonl"), "type": "completion", "field": "text"}],
        **{"micro_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 3, "logging_steps": 1},
        **{"learning_rate": 1e-3, "optimizer": "adamw_torch", "attn_implementation": "sdpa", "bf16": False},
        **{"save_strategy": "no", "seed": 42, "dataset_prepared_path": str(folder / "axolotl-prepared")},  # one order
    }
    plugged_in = {**config, "plugins": ["padfree_patch.integrations.axolotl.PadfreePlugin"]}
    (folder / "axolotl.yml").write_text(json.dumps(config))  # which is YAML, too
    (folder / "axolotl-plugged-in.yml").write_text(json.dumps(plugged_in))


def words(generator: random.Random, most: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(2, most)))


def main(folder: Path, architecture: str = "llama") -> None:
    """Prints the ids of the end token and of the padding."""
    tokenizer = make_tokenizer(folder / "model")
    make_model(folder / "model", architecture, tokenizer)
    write_texts(folder)
    write_configs(folder)
    print(tokenizer.eos_token_id, tokenizer.pad_token_id)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
