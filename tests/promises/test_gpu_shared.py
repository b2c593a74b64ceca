"""On CUDA: a row in which examples share a prompt trains like the row of whole examples, on every backend."""

from __future__ import annotations

import pytest
import torch

from helpers.models import MACHINERY
from padfree_patch import DataCollatorWithFlattening, applied
from padfree_patch.attention import BACKENDS, Needs
from padfree_patch.testing import examples, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default::DeprecationWarning"),  # of torch's compiler, which warns of itself
]
BY_NAME = {backend.NAME: backend for backend in BACKENDS}


def rows(device):
    """Returns the same two groups of three completions, as whole examples and with each prompt once."""
    whole = []
    for seed, length in ((1, 40), (2, 9)):
        prompt, *completions = (each[0] for each in examples((length, 12, 1, 5), seed=seed))
        for each in completions:
            labels = torch.cat([torch.full_like(prompt, -100), each])
            whole.append({"input_ids": torch.cat([prompt, each]), "labels": labels})
    collators = (
        DataCollatorWithFlattening(return_flash_attn_kwargs=True),
        DataCollatorWithFlattening(share_prefixes=True),
    )
    return [
        {name: value.to(device) if hasattr(value, "to") else value for name, value in collate(whole).items()}
        for collate in collators
    ]


def gradients(model, batch, backend="auto"):
    with applied(model, backend=backend):
        model.train()(**batch, use_cache=False).loss.backward()
    found = {name: each.grad.float().cpu() for name, each in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("backend", ["flash_attn", "torch_varlen", "flex", "sdpa"])
def test_shared_prompts_train_like_whole_examples(backend, window):
    """In bfloat16, no further from float32 on the CPU than the row of whole examples, with a factor for luck."""
    patch = MACHINERY[0] if window is None else next(each for each in MACHINERY if each.model_type == "mistral")
    if reason := BY_NAME[backend].refusal(Needs("cuda", torch.bfloat16, 64, window=window or 0)):
        pytest.skip(reason)
    config = {} if window is None else {"sliding_window": window}

    def make():
        return tiny_model(patch, hidden_size=384, **config)

    exact = gradients(make(), rows("cpu")[0])
    whole, shared = rows("cuda")
    bounds, found = (gradients(make().bfloat16().cuda(), row, backend) for row in (whole, shared))
    for name in found:
        error, bound = ((one[name] - exact[name]).norm() for one in (found, bounds))
        assert error < 2 * bound + 1e-4 * exact[name].norm(), f"{name}: {error:.1e}, whole examples {bound:.1e}"
