"""A training step of a model that computes the logits of labelled tokens only, beside one that computes all."""

from __future__ import annotations

import torch

from padfree_patch.testing import conformance

FORMS = ("labelled", "chunked")


def training_step(model, batch, **more):
    """Returns the loss, the gradients by name, and what the model gave."""
    torch.manual_seed(0)  # of dropout
    output = model.train()(**batch, **more)
    loss = output[0] if isinstance(output, tuple) else output["loss"]
    loss.backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return loss.item(), gradients, output


def assert_same_step(found, expected):
    """Raises AssertionError unless the steps have the same loss and gradients, and the first computed fewer logits."""
    torch.testing.assert_close(found[0], expected[0], rtol=2e-6, atol=1e-7)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        error = (found[1][name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < conformance.GRADIENT_TOLERANCE, f"gradient of {name} is off by {error:.2e}"
    assert rows_of_logits(found[2]) < rows_of_logits(expected[2])  # or nothing was chosen, and all of it is trivial


def rows_of_logits(output) -> int:
    """Counts the rows of logits that a model gave, (B, T, V); 0 for none."""
    logits = output[1] if isinstance(output, tuple) else output.get("logits")
    return 0 if logits is None else logits.shape[0] * logits.shape[1]
