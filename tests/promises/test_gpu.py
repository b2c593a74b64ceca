"""On CUDA, for those who have one: the real flash-attn kernels, and the models loaded for them. Skipped elsewhere."""

from __future__ import annotations

import pytest
import torch

from helpers.models import PATCHES, skip_if_unavailable
from padfree_patch import PackedSequences, applied, versions
from padfree_patch.attention import Needs, flash_attn, sdpa, select
from padfree_patch.testing import conformance, examples, pack, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_flash_attn = pytest.mark.skipif(versions.installed("flash-attn") is None, reason="needs flash-attn")


@needs_flash_attn
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [0, 4, 100])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_flash_attn_equals_float64(dtype, window, head_dim):
    lengths = (5, 1, 130, 3)
    sequences = PackedSequences.from_lengths(lengths, device="cuda")
    assert select(Needs("cuda", dtype, head_dim, window=window)).NAME == "flash_attn"
    qkv = [torch.randn(sum(lengths), h, head_dim, device="cuda", dtype=dtype, requires_grad=True) for h in (4, 2, 2)]
    output = flash_attn.attend(*qkv, sequences, scale=head_dim**-0.5, window=window)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = sdpa.attend(*exact, sequences, scale=head_dim**-0.5, window=window)
    found, wanted = torch.autograd.grad(output.sum(), qkv), torch.autograd.grad(expected.sum(), exact)
    for one, other in zip((output, *found), (expected, *wanted)):
        # A few eps of the dtype, relative in the Frobenius norm.
        assert (one.double() - other).norm() < 8 * torch.finfo(dtype).eps * other.norm()


@pytest.mark.parametrize("loaded_as", ["eager", "sdpa", pytest.param("flash_attention_2", marks=needs_flash_attn)])
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.model_type)
def test_packed_row_is_no_worse_than_upstream_alone(patch, loaded_as):
    """bfloat16 against float32 on the CPU; the bound is upstream's own error, with a factor for luck in rounding."""

    def make(implementation=loaded_as):
        return tiny_model(patch, implementation)

    skip_if_unavailable(lambda: make("eager"))
    sequences = examples((5, 9, 1, 12))
    exact = conformance.logits_alone(lambda: make("eager"), sequences)
    on_gpu = [each.cuda() for each in sequences]
    upstream = conformance.logits_alone(lambda: make().bfloat16().cuda(), on_gpu).float().cpu()
    batch = {name: value.cuda() for name, value in pack(sequences).items()}
    with applied(make().bfloat16().cuda()) as model, torch.no_grad():
        packed = model(**batch).logits.float().cpu()
    assert (packed - exact).norm() < 1.5 * (upstream - exact).norm()
