"""What a packed row's results must equal: each example run alone through the unpatched model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..batch.labels import IGNORED_LABEL

Make = Callable[[], nn.Module]
"""Makes a causal language model, the same one on every call."""

LOGIT_TOLERANCE = 2e-5
"""Relative to the largest logit, float32: matmuls of other shapes add in another order, a few eps per layer."""

GRADIENT_TOLERANCE = 2e-4
"""Frobenius norm of the difference over that of the gradient, per parameter; sums over all tokens."""


def as_batch(tokens: Tensor) -> dict[str, Tensor]:
    """Makes a batch of one example, with a mask as padding would: Falcon's ALiBi on sdpa is causal only with a mask."""
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def logits_alone(make: Make, sequences: Sequence[Tensor]) -> Tensor:
    """Returns logits (1, T, V): each example's from a new unpatched model, in which no other has left traces."""
    with torch.no_grad():
        return torch.cat([_logits_of_one(make, each) for each in sequences], dim=1)


def _logits_of_one(make: Make, tokens: Tensor) -> Tensor:
    model = make()
    # Gemma 2 of 4.45 and 4.46 on flash-attn reads beyond its example where it has a mask and a cache.
    no_cache = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    try:
        logits: Tensor = model(**as_batch(tokens), **no_cache).logits
        return logits
    except TypeError:  # Falcon 4.36 to 4.44 can't run one token alone; what follows it can't change its logits
        assert tokens.shape[1] == 1
        logits = make()(**as_batch(tokens.repeat(1, 2))).logits
        return logits[:, :1]


def alone_loss_and_gradients(
    make: Make, sequences: Sequence[Tensor], labels: Sequence[Tensor] | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Returns the mean loss over all predicted labels of the examples, each run alone, and its gradients by name.

    The labels are the tokens themselves, unless others are given.
    """
    labels = sequences if labels is None else labels
    counts = [int((each[:, 1:] != IGNORED_LABEL).sum()) for each in labels]
    loss = 0.0
    gradients: dict[str, Tensor] = {}
    for each, its_labels, predicted in zip(sequences, labels, counts):
        if not predicted:
            continue  # nothing to predict, and upstream's mean over no tokens is NaN
        model = make().train()
        weighted = model(**as_batch(each), labels=its_labels).loss * predicted / sum(counts)
        weighted.backward()
        loss += weighted.item()
        add_gradients(gradients, gradients_of(model))
    return loss, gradients


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns the gradients of the parameters that have one, by name."""
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def add_gradients(total: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Adds gradients to a total in place; an expert may have a gradient in only one of the two."""
    for name, gradient in more.items():
        total[name] = gradient + total.get(name, 0)


def assert_gradients_close(model: nn.Module, expected: Mapping[str, Tensor]) -> None:
    """Raises AssertionError, naming the parameter, if a gradient of the model is not the expected one."""
    found = gradients_of(model)
    for name, gradient in expected.items():
        difference = found.get(name, 0) - gradient  # an expert that no token came to may have none
        error = difference.norm() / gradient.norm().clamp_min(1e-12)
        assert error < GRADIENT_TOLERANCE, f"gradient of {name} is off by {error:.2e}"
    for name in found.keys() - expected.keys():
        assert found[name].norm() == 0, f"{name} has a gradient, which it has not alone"


def assert_logits_close(found: Tensor, expected: Tensor, what: str = "logits") -> None:
    """Raises AssertionError if logits are further apart than rounding explains."""
    error = largest(found - expected) / largest(expected)
    assert error < LOGIT_TOLERANCE, f"{what} are off by {error:.2e} of the largest"


def largest(tensor: Tensor) -> float:
    """Returns the largest absolute value."""
    return tensor.detach().abs().max().item()
