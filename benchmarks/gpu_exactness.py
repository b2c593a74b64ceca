"""How far bfloat16 on a device is from float32 on the CPU: models of every patch, and attention alone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from padfree_patch import PackedSequences, PadfreeError, applied, attention
from padfree_patch.attention import sdpa
from padfree_patch.registry import registry
from padfree_patch.testing import examples, pack, tiny_model
from padfree_patch.testing.conformance import alone_loss_and_gradients, logits_alone
from padfree_patch.testing.models import Unavailable

LENGTHS = (5, 9, 1, 130, 12)
OPTIONS: dict[str, dict[str, float]] = {"": {}, "window 64": {"window": 64}, "softcap 30": {"softcap": 30.0}}


def model_errors(names: list[str], device: str, chosen: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Returns, for each model (`chosen`, or all), backend and implementation, the errors over upstream's own alone."""
    return [
        each
        for name, make in models()
        if not chosen or name in chosen
        for implementation in ("eager", "sdpa")
        for each in errors_of({"model": name, "implementation": implementation}, make, names, device)
    ]


def models() -> Iterator[tuple[str, Callable[[str], nn.Module]]]:
    """Yields the tiny model of each patch, with heads that every kernel takes, and SmolLM2-135M's shape."""
    for patch in registry().patches():
        changes = {"max_position_embeddings": 256}
        if "n_heads" not in patch.tiny:  # heads of 64, which every kernel takes; those of Dbrx stay 8
            changes["hidden_size"] = 384
        yield patch.model_type, functools.partial(tiny_model, patch, **changes)
    yield "smollm2-135m", smollm2


def smollm2(implementation: str) -> nn.Module:
    """Copies a Llama of SmolLM2-135M's shape with random weights: making one takes longer."""
    return copy.deepcopy(_smollm2(implementation))


@functools.cache
def _smollm2(implementation: str) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=30
    )
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return model.eval()


def errors_of(
    of: dict[str, str], make: Callable[[str], nn.Module], names: list[str], device: str
) -> list[dict[str, Any]]:
    """Returns an entry per backend: error of logits and gradients over upstream's alone, or why there is none."""

    def on_cpu() -> nn.Module:
        return make(of["implementation"])

    def on_device() -> nn.Module:
        return on_cpu().bfloat16().to(device)

    sequences = examples(LENGTHS)
    try:
        exact = logits_alone(on_cpu, sequences), alone_loss_and_gradients(on_cpu, sequences)[1]
    except Unavailable as error:
        return [{**of, "unavailable": str(error)}]

    there = [each.to(device) for each in sequences]
    upstream = logits_alone(on_device, there), alone_loss_and_gradients(on_device, there)[1]
    bounds = [distance(one, other) for one, other in zip(upstream, exact)]
    found = []
    for backend in names:
        try:
            results = packed_results(on_device(), there, backend)
        except (PadfreeError, RuntimeError) as error:  # a RuntimeError: a package that was built without this head size
            found.append({**of, "backend": backend, "refused": str(error)})
            continue
        ratios = [distance(one, other) / bound for one, other, bound in zip(results, exact, bounds)]
        found.append({**of, "backend": backend, "logits": ratios[0], "gradients": ratios[1]})
    return found


def packed_results(model: nn.Module, sequences: list[Tensor], backend: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the logits and gradients of one packed row; apply's own check runs as well."""
    batch = {name: value.to(sequences[0].device) for name, value in pack(sequences).items()}
    with applied(model, backend=backend):
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits
        model.train()
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    return logits, {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def distance(found: Tensor | dict[str, Tensor], exact: Tensor | dict[str, Tensor]) -> float:
    """Returns the Frobenius norm of the difference; of gradients by name, the root of the sum of squares."""
    if isinstance(found, Tensor) and isinstance(exact, Tensor):
        return float((found.detach().float().cpu() - exact).norm())
    assert isinstance(found, dict) and isinstance(exact, dict)
    return sum(distance(found[name], each) ** 2 for name, each in exact.items() if name in found) ** 0.5


def attention_errors(device: str) -> list[dict[str, Any]]:
    """Returns the largest error over the largest value, against float64, of each backend alone, and PyTorch's own."""
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for option, arguments in OPTIONS.items():
            wanted = attention.Needs(device, dtype, 128, **arguments)  # type: ignore[arg-type]
            for backend in attention.BACKENDS:
                if backend.refusal(wanted) is None:
                    of = {"dtype": str(dtype)[6:], "option": option, "backend": backend.NAME}
                    found.append({**of, **attention_error(backend, dtype, arguments, device)})
    return found


def attention_error(
    backend: attention.Backend, dtype: torch.dtype, arguments: dict[str, Any], device: str
) -> dict[str, Any]:
    """Returns the error of the output and the largest of those of the gradients; 8 query heads, 2 key heads."""
    torch.manual_seed(0)
    sequences = PackedSequences.from_lengths(LENGTHS, device=device)
    qkv = [torch.randn(sequences.total, heads, 128, device=device, dtype=dtype) for heads in (8, 2, 2)]
    weight = torch.randn_like(qkv[0])
    results = []
    for attend, kind in ((backend.attend, dtype), (sdpa.attend, torch.float64)):
        inputs = [each.to(kind).requires_grad_() for each in qkv]
        try:
            output = attend(*inputs, sequences, scale=128**-0.5, **arguments)
        except RuntimeError as error:  # a package that was built without this option
            return {"refused": str(error)}
        results.append([output.detach(), *torch.autograd.grad((output * weight.to(kind)).sum(), inputs)])
    output, *gradients = (float((one.double() - exact).abs().max() / exact.abs().max()) for one, exact in zip(*results))
    return {"output": output, "gradients": max(gradients)}
