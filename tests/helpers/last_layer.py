"""A packed batch, of whose tokens few predict a label, and on which of them the last layer of a tiny model runs."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from padfree_patch import versions
from padfree_patch.registry import registry
from padfree_patch.testing import conformance, examples, pack, tiny_model

SEQUENCES = examples(conformance.LENGTHS)
TOKENS, PREDICTED = 27, 11
IMPLEMENTATION = "sdpa" if versions.transformers(">=4.36") else "eager"


def packed_batch():
    return pack(SEQUENCES) | {"labels": torch.cat(conformance.completions(SEQUENCES), dim=1)}


def make(name="llama", implementation=IMPLEMENTATION, **config):
    return tiny_model(registry().get(name), implementation, **config)


class Rows(TorchDispatchMode):
    """Counts the rows of each matrix product that a forward makes with a weight of a given number of columns."""

    def __init__(self, columns):
        super().__init__()
        self.columns, self.found = columns, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            a, b = args[-2:]
            if b.shape[0] == self.columns:
                self.found.append(a.shape[0])
        return function(*args, **(kwargs or {}))


def rows_of_down_projections(model, batch, **more):
    """Returns the rows of each layer's down projection, in the order of layers."""
    with Rows(model.config.intermediate_size) as rows:
        model.train()(**batch, **more)
    return rows.found


def is_narrowed(model, batch, **more):
    found = rows_of_down_projections(model, batch, **more)
    assert found[:-1] == [TOKENS] * (len(found) - 1)
    assert len(found) == model.config.num_hidden_layers
    return found[-1] == PREDICTED
