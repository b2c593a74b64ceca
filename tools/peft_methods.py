"""Tries every method of the installed PEFT on a packed row, with apply before and after it; `nox -s peft` runs it.

python tools/peft_methods.py FOLDER

It writes what came of each method into a file in the folder, and docs/peft.md from all files there, if they are of
every PEFT of which that page tells.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

import padfree_patch
from padfree_patch.registry import registry
from padfree_patch.testing import conformance, examples, pack, tiny_model
from peft_page import write_page

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INVOCATION = [7, 8]
EXACT = "exact"
SAMPLES = ("PVERA", "MonteCLoRA")
"""Methods that draw their weights in training."""


class Method(NamedTuple):
    """How a method is configured for the tiny model."""

    peft_type: str
    config: Mapping[str, Any] = {}
    on: Sequence[str] | None = TARGETS
    """target_modules, if it has any."""
    put_in: Callable[[Any, Any, list[str]], Any] = lambda model, config, saved: peft.get_peft_model(model, config)
    """Puts the config into a model, with the folders of two saved LoRAs at hand."""


PROMPT = {"num_virtual_tokens": 4, "encoder_hidden_size": 16, "num_tasks": 2}
NORMS = ["input_layernorm", "post_attention_layernorm"]
OWN_SIZES: dict[str, Method] = {
    "ADALORA": Method("ADALORA", {"total_step": 10, "init_r": 4, "target_r": 2}),
    "ADAPTION_PROMPT": Method("ADAPTION_PROMPT", {"adapter_len": 4, "adapter_layers": 2}, None),
    "BOFT": Method("BOFT", {"boft_block_size": 4}),
    "BONE": Method("BONE", {"r": 4}),
    "C3A": Method("C3A", {"block_size": 16}),
    "CARTRIDGE": Method("CARTRIDGE", PROMPT, None),
    "CPT": Method("CPT", {"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]}, None),
    "FOURIERFT": Method("FOURIERFT", {"n_frequency": 20}),
    "FROD": Method("FROD", {"progressbar": False}),
    "IA3": Method("IA3", {"feedforward_modules": ["down_proj"]}, ["k_proj", "v_proj", "down_proj"]),
    "LN_TUNING": Method("LN_TUNING", {}, NORMS),
    "MISS": Method("MISS", {"r": 4}),
    "MULTITASK_PROMPT_TUNING": Method("MULTITASK_PROMPT_TUNING", PROMPT, None),
    "OFT": Method("OFT", {"r": 0, "oft_block_size": 4}),
    "OSF": Method("OSF", {"effective_rank": 4}),
    "POLY": Method("POLY", {"n_tasks": 2, "n_skills": 2, "r": 2}),
    "PREFIX_TUNING": Method("PREFIX_TUNING", PROMPT, None),
    "PROMPT_TUNING": Method("PROMPT_TUNING", PROMPT, None),
    "PSOFT": Method("PSOFT", {"r": 4}),
    "P_TUNING": Method("P_TUNING", PROMPT, None),
    "ROAD": Method("ROAD", {"group_size": 8}),
    "SHADOW": Method("SHADOW", {"shadow_dropout": 0.0}, None),
    "SHIRA": Method("SHIRA", {"r": 4}),
    "TRAINABLE_TOKENS": Method("TRAINABLE_TOKENS", {"token_indices": INVOCATION}, ["embed_tokens"]),
    "VBLORA": Method("VBLORA", {"num_vectors": 8, "vector_length": 16, "topk": 2}),
    "WAVEFT": Method("WAVEFT", {"n_frequency": 20}),
    "XLORA": Method("XLORA", {"hidden_size": 48, "xlora_depth": 1}, None),
}


def mixed(model: Any, config: Any, saved: list[str]) -> Any:
    adapted = peft.get_peft_model(model, config, mixed=True)
    adapted.add_adapter("other", peft.LoHaConfig(target_modules=TARGETS))
    adapted.set_adapter(["default", "other"])
    return adapted


def native(model: Any, config: Any, saved: list[str]) -> Any:
    model.add_adapter(config)
    return model


def arrow(model: Any, config: Any, saved: list[str]) -> Any:
    adapted = peft.create_arrow_model(model, saved, peft.ArrowConfig(top_k=1))
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return adapted


LORA_VARIANTS: dict[str, Method] = {
    "LORA, beside LOHA (PeftMixedModel)": Method("LORA", put_in=mixed),
    "LORA, by transformers' add_adapter": Method("LORA", put_in=native),
    "LORA, Arrow": Method("LORA", {"arrow_config": None}, put_in=arrow),
    "LORA, activated (aLoRA)": Method("LORA", {"alora_invocation_tokens": INVOCATION}),
    "LORA, DoRA": Method("LORA", {"use_dora": True}),
    "LORA, on embeddings": Method("LORA", {}, ["embed_tokens", "q_proj"]),
    "LORA, with trained tokens": Method("LORA", {"trainable_token_indices": INVOCATION}),
    "LORA, with trained head": Method("LORA", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "LORA, repeated layers": Method("LORA", {"layer_replication": [(0, 2), (1, 3)]}),
    "LORA, KaSA": Method("LORA", {"kasa_config": {}}),
    "LORA, MonteCLoRA": Method("LORA", {"monteclora_config": {}}),
    "LORA, VeLoRA": Method("LORA", {"velora_config": {"num_groups": 4}}),
    "LORA, VeLoRA (random)": Method("LORA", {"velora_config": {"num_groups": 4, "init_type": "random"}}),
}


def methods() -> dict[str, Method]:
    """Returns every method of the installed PEFT, and the variants of LoRA that it has, by the name of its row."""
    types = [kind.value for kind in peft.PeftType if kind in PEFT_TYPE_TO_CONFIG_MAPPING]
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    variants = {name: method for name, method in LORA_VARIANTS.items() if method.config.keys() <= fields}
    return {**{name: OWN_SIZES.get(name, Method(name)) for name in types}, **variants}


def texts() -> list[Tensor]:
    """Makes examples that hold the invocation tokens, once or twice."""
    made = examples((5, 9, 4, 7))
    for text, places in zip(made, ((2,), (0, 5), (1,), (4,))):
        for place in places:
            text[0, place : place + 2] = torch.tensor(INVOCATION)
    return made


class Bench:
    """The tiny model with one method."""

    def __init__(self, name: str, method: Method, **model: Any):
        self.name, self.method, self._model = name, method, model
        self._folder = tempfile.TemporaryDirectory()

    def base(self) -> Any:
        return tiny_model(registry().get("llama"), "sdpa", **self._model)

    def adapted(self, model: Any) -> Any:
        """Puts the method in, with weights far enough from their start to be seen."""
        if self.name == "XLORA":
            model.config.use_cache = False  # as it demands
        saved = list(self._saved_loras().values()) if self.method.put_in is arrow else []
        config = self._config()
        torch.manual_seed(0)
        adapted = self.method.put_in(model, config, saved)
        adapted.train(self.name.split(", ")[-1] not in SAMPLES)
        generator = torch.Generator().manual_seed(3)
        for parameter in adapted.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return adapted

    def _config(self) -> peft.PeftConfig:
        cls = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(self.method.peft_type)]
        values = {"task_type": "CAUSAL_LM", "target_modules": self.method.on, **self.method.config}
        if self.method.peft_type == "XLORA":
            values["adapters"] = self._saved_loras()
        fields = {field.name for field in dataclasses.fields(cls)}
        if self.name == "OFT" and "oft_block_size" not in fields:
            values["r"] = 8  # before PEFT 0.14 it takes the number of blocks only
        return cls(**{name: value for name, value in values.items() if name in fields and value is not None})

    def _saved_loras(self) -> dict[str, str]:
        """Saves two LoRAs; returns their folders by name."""
        folders = {name: str(Path(self._folder.name, name)) for name in ("0", "1")}
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        for seed, folder in enumerate(folders.values()):
            torch.manual_seed(seed)
            peft.get_peft_model(self.base(), config).save_pretrained(folder)
        return folders

    def run(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the logits of the tokens, without virtual ones, and the loss."""
        tasks = {"task_ids": torch.zeros(1, dtype=torch.int64)} if "TASK" in self.name or self.name == "POLY" else {}
        output = model(**batch, labels=batch["input_ids"], **tasks)
        return output.logits[:, -batch["input_ids"].shape[1] :], output.loss

    def alone(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the oracle: logits, and the gradients of the mean over all predicted tokens."""
        logits, gradients, sequences = [], {}, texts()
        predicted = sum(each.shape[1] - 1 for each in sequences)
        for each in sequences:
            model = self.adapted(self.base())
            found, loss = self.run(model, conformance.as_batch(each))
            (loss * (each.shape[1] - 1) / predicted).backward()
            logits.append(found.detach())
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    gradients[name] = parameter.grad + gradients.get(name, 0)
        return torch.cat(logits, dim=1), gradients

    def packed(self, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the same of the packed row."""
        logits, loss = self.run(model, pack(texts()))
        loss.backward()
        return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def apply_before(bench: Bench) -> nn.Module:
    return bench.adapted(padfree_patch.apply(bench.base()))


def apply_after(bench: Bench) -> nn.Module:
    return padfree_patch.apply(bench.adapted(bench.base()))


ORDERS: dict[str, Callable[[Bench], nn.Module]] = {"before": apply_before, "after": apply_after}


def verdict(bench: Bench, order: str, alone: tuple[Tensor, dict[str, Tensor]]) -> dict[str, Any]:
    """Says whether a packed row is exact with the method, and how far it is from each example alone, or who refuses."""
    try:
        logits, gradients = bench.packed(ORDERS[order](bench))
    except padfree_patch.PadfreeError as refusal:
        return {"said": f"refused: {str(refusal).splitlines()[0]}"}
    off = conformance.largest(logits - alone[0]) / conformance.largest(alone[0])
    norm = max(each.norm().item() for each in alone[1].values())
    names = gradients.keys() | alone[1].keys()  # one that only one of them has counts whole
    apart = max(torch.norm(gradients.get(name, 0) - alone[1].get(name, 0)).item() for name in names) / norm
    right = off <= conformance.LOGIT_TOLERANCE and apart <= conformance.GRADIENT_TOLERANCE
    return {"said": EXACT if right else "WRONG", "logits": off, "gradients": apart}


def tried(name: str, method: Method) -> dict[str, Any]:
    """Tries one method in both orders; on a model without grouped queries if PEFT itself can't do with these."""
    reasons = []
    for model in ({}, {"num_key_value_heads": 6}, {"num_key_value_heads": 6, "intermediate_size": 48}):
        bench = Bench(name, method, **model)
        try:
            alone = bench.alone()
        except Exception as error:  # PEFT's own
            reasons.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        with torch.no_grad():
            plain = torch.cat([bench.base()(**conformance.as_batch(each)).logits for each in texts()], dim=1)
        if torch.equal(plain, alone[0]):
            return {"said": "without any effect here"}
        return {order: verdict(bench, order, alone) for order in ORDERS}
    return {"said": f"fails without us: {reasons[0]}"}


def results() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, method in methods().items():
        yield name, tried(name, method)


def main(folder: Path) -> None:
    """Writes what came of each method, and the page."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = {}
    for name, result in results():
        found[name] = result
        print(name, result, flush=True)
    versions = {"peft": peft.__version__, "transformers": transformers.__version__}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{peft.__version__}.json").write_text(json.dumps({**versions, "methods": found}, indent=1))
    write_page(folder)
    wrong = [name for name, each in found.items() for order in ORDERS if each.get(order, {}).get("said") == "WRONG"]
    sys.exit(f"wrong: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
