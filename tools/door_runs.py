"""What tools/door.py runs: each tool on its own command line, as people call it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

HERE = Path(__file__).parent
SHORT, LONG = "3", "12"  # steps; ten without a second example are needed before the door says what to switch on


@dataclasses.dataclass(frozen=True)
class Run:
    """One way to call a tool. FOLDER in its words becomes the folder of model and texts, OUT that of results."""

    tool: str
    environment: str
    """Of `tools/pins.py`."""
    how: str
    """What is switched on, in the tool's words."""
    command: tuple[str, ...]
    plugged_in: tuple[str, ...] = ()
    """The command with our plug-in for the tool, where that is tried instead of `padfree-patch run` before it."""
    flash_attention: bool = False
    """Whether the tool takes nothing but flash-attn, in whose place tests/helpers/stand_ins stands."""

    @property
    def name(self) -> str:
        return f"{self.tool}: {self.how}"

    @property
    def key(self) -> str:
        """Returns the name of what was measured, in docs/tools.json."""
        return f"{self.name} ({self.environment})"

    @property
    def command_with_door(self) -> tuple[str, ...]:
        return self.plugged_in or ("padfree-patch", "run", "--", *self.command)


def trl(how: str, *options: str) -> Run:
    """A run of TRL's own command line; it starts a child through accelerate."""
    steps = LONG if "wrapped" in options else SHORT
    common = (
        *("--model_name_or_path", "FOLDER/model", "--dataset_name", "FOLDER/trl", "--output_dir", "OUT"),
        *("--max_steps", steps, "--logging_steps", "1", "--learning_rate", "1e-3"),
        *("--dtype", "float32", "--bf16", "false", "--use_cpu", "--report_to", "none", "--save_strategy", "no"),
    )
    packing = ("--max_length", "96", "--per_device_train_batch_size", "2")
    unpacked = ("--config", "FOLDER/run.yaml", "--per_device_train_batch_size", "3")
    batch = packing if "--packing" in options else unpacked
    return Run("TRL", "trl", how, ("trl", "sft", *common, *batch, *options))


def llamafactory(how: str, *options: str) -> Run:
    common = (
        *("stage=sft", "do_train=true", "finetuning_type=full", "model_name_or_path=FOLDER/model", "template=mistral"),
        *("dataset_dir=FOLDER/llamafactory", "dataset=texts", "cutoff_len=128", "output_dir=OUT", "max_steps=3"),
        *("per_device_train_batch_size=1", "logging_steps=1", "save_strategy='no'", "learning_rate=1.0e-3"),
        *("report_to=none", "flash_attn=sdpa", "use_cpu=true"),
    )
    return Run(
        "LLaMA-Factory", "llamafactory", how, ("llamafactory-cli", "train", "FOLDER/run.yaml", *common, *options)
    )


def swift(how: str, *options: str, implementation: str = "sdpa", plug_in: tuple[str, ...] = ()) -> Run:
    steps = SHORT if options else LONG
    common = (
        *("--model", "FOLDER/model", "--model_type", "llama", "--template", "dummy", "--dataset", "FOLDER/chats.jsonl"),
        *("--tuner_type", "full", "--max_steps", steps, "--per_device_train_batch_size", "3", "--logging_steps", "1"),
        *("--output_dir", "OUT", "--torch_dtype", "float32", "--use_hf", "true", "--report_to", "none"),
        *("--save_strategy", "no", "--attn_impl", implementation, "--max_length", "96", "--split_dataset_ratio", "0"),
    )
    command = ("swift", "sft", *common, *options)
    plugged_in = (*command, *plug_in) if plug_in else ()
    return Run("ms-swift", "swift", how, command, plugged_in, flash_attention=implementation != "sdpa")


def axolotl(how: str, plug_in: str = "") -> Run:
    """A run of axolotl, whose plug-ins stand in its config file only; it starts a child through accelerate."""
    command = ("axolotl", "train", "FOLDER/axolotl.yml", "--output-dir", "OUT")
    plugged_in = tuple(plug_in if word == "FOLDER/axolotl.yml" else word for word in command) if plug_in else ()
    return Run("axolotl", "axolotl", how, command, plugged_in)


SWIFT_PLUG_IN = HERE.parent / "padfree_patch" / "integrations" / "ms_swift" / "padfree_plugin.py"
SCRIPT = (str(HERE / "door_train.py"), "FOLDER", "OUT")

RUNS = (
    trl("--packing", "--packing", "--attn_implementation", "sdpa"),
    trl("--packing, eager", "--packing", "--attn_implementation", "eager"),
    trl("--padding_free", "--padding_free", "--attn_implementation", "sdpa"),
    trl(
        "--packing, LoRA, gradient checkpointing",
        *("--packing", "--attn_implementation", "sdpa", "--use_peft", "--lora_dropout", "0"),
        *("--lora_target_modules", "q_proj", "v_proj", "--gradient_checkpointing"),
    ),
    trl("--packing_strategy wrapped", "--packing", "--packing_strategy", "wrapped", "--attn_implementation", "sdpa"),
    llamafactory("packing: true", "packing=true"),
    llamafactory("neat_packing: true", "neat_packing=true"),
    swift("padded"),
    swift("--padding_free true", "--padding_free", "true", implementation="flash_attention_2"),
    swift("--packing true", "--packing", "true", implementation="flash_attention_2"),
    swift(
        "--packing true, our plug-in",
        *("--packing", "true"),
        implementation="flash_attention_2",
        plug_in=("--external_plugins", str(SWIFT_PLUG_IN)),
    ),
    axolotl("sample_packing: true"),
    axolotl("sample_packing: true, our plug-in", "FOLDER/axolotl-plugged-in.yml"),
    Run(
        "accelerate launch",
        "trl",
        "a Trainer script",
        ("accelerate", "launch", "--cpu", "--num_processes", "1", *SCRIPT),
    ),
    Run("torchrun", "trl", "a Trainer script, two ranks", ("torchrun", "--nproc_per_node", "2", *SCRIPT)),
    Run("python", "old", "a Trainer script with our DataCollatorWithFlattening", ("python", *SCRIPT)),
)
