"""On CUDA, for those who have one: the real flash-attn kernels, and the models loaded for them. Skipped elsewhere."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch

from helpers.any_decoder import CONFIGS, tiny_decoder
from helpers.models import MACHINERY, PATCHES, skip_if_unavailable
from padfree_patch import DataCollatorWithFlattening, PackedSequences, applied, versions
from padfree_patch.attention import BACKENDS, Needs, flash_attn, sdpa, select
from padfree_patch.registry import registry
from padfree_patch.testing import checkpointing, conformance, examples, pack, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default::DeprecationWarning"),  # of torch's compiler, which warns of itself
]
BY_NAME = {backend.NAME: backend for backend in BACKENDS}
FOUND = [name for name in CONFIGS if registry().get(name) is None and name != "bart"]  # its labels are not shifted
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
    skip_if_unavailable(make)  # Gemma 2 and GPT-OSS have no sdpa from 5.24 on
    sequences = examples((5, 9, 1, 12))
    exact = conformance.logits_alone(lambda: make("eager"), sequences)
    on_gpu = [each.cuda() for each in sequences]
    upstream = conformance.logits_alone(lambda: make().bfloat16().cuda(), on_gpu).float().cpu()
    batch = {name: value.cuda() for name, value in pack(sequences).items()}
    with applied(make().bfloat16().cuda()) as model, torch.no_grad():
        packed = model(**batch).logits.float().cpu()
    assert (packed - exact).norm() < 1.5 * (upstream - exact).norm()


@pytest.fixture
def on_cuda():
    """Makes the same tiny Llama in bfloat16 on every call, and a batch with the collator's lengths."""

    def make(**config):
        return tiny_model(MACHINERY[0], hidden_size=384, **config).bfloat16().cuda()

    return make


def batch_of(lengths=(5, 9, 1, 12), *, seed=1):
    """Returns a packed batch as our collator makes it, on the device."""
    rows = [{"input_ids": each[0]} for each in examples(lengths, seed=seed)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def step(model, batch):
    """Returns the loss and the gradients of one step."""
    model.zero_grad(set_to_none=True)
    loss = model.train()(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), [each.grad.clone() for each in model.parameters()]


@contextlib.contextmanager
def syncs():
    """Gives a function that lists what waited for the device since this began."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: [each for each in caught if "called a synchronizing" in str(each.message)]
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_step_with_the_collators_lengths_never_waits(on_cuda):
    with applied(on_cuda()) as model:
        step(model, batch_of())  # kernels are compiled and loaded
        batch = batch_of((3, 17, 8), seed=2)
        torch.cuda.synchronize()
        with syncs() as messages:
            step(model, batch)
            assert not messages()
            batch["input_ids"].max().item()
            assert len(messages()) == 1  # the control


def test_a_step_with_positions_alone_waits_once(on_cuda):
    with applied(on_cuda()) as model:
        step(model, batch_of())
        batch = {name: batch_of((3, 17, 8), seed=2)[name] for name in ("input_ids", "position_ids", "labels")}
        with syncs() as messages:
            step(model, batch)
            assert len(messages()) == 1


def test_another_stream_gives_the_same_step(on_cuda):
    with applied(on_cuda()) as model:
        batch = batch_of()
        expected = step(model, batch)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = step(model, batch)
        torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_recomputed_layers_train_like_kept_ones(on_cuda, reentrant):
    """The backward recomputes in the autograd thread of the device."""
    with applied(on_cuda()) as model:
        expected = step(model, batch_of())
        checkpointing(reentrant=reentrant)(model)
        found = step(model, batch_of())
    torch.testing.assert_close(found, expected)


def test_autocast_is_no_worse_than_upstreams_alone():
    sequences = examples((5, 9, 1, 12))

    def make():
        return tiny_model(MACHINERY[0], hidden_size=384).cuda()

    exact = conformance.logits_alone(make, [each.cuda() for each in sequences]).float()
    batch = {name: value.cuda() for name, value in pack(sequences).items()}
    with torch.autocast("cuda", torch.bfloat16):
        upstream = conformance.logits_alone(make, [each.cuda() for each in sequences]).float()
        with applied(make()) as model, torch.no_grad():
            packed = model(**batch).logits.float()
    assert (packed - exact).norm() < 1.5 * (upstream - exact).norm()


def test_positions_changed_in_place_are_read_again(on_cuda):
    batch = {name: value.cuda() for name, value in pack(examples((5, 9, 2))).items()}
    other = pack(examples((2, 5, 9)))["position_ids"].cuda()
    with applied(on_cuda()) as model, torch.no_grad():
        model(**batch)
        batch["position_ids"].data.copy_(other)  # past the version counter, as numpy or a loader's buffer would
        found = model(**batch).logits
        expected = model(input_ids=batch["input_ids"], position_ids=other.clone()).logits
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_a_packed_forward_can_not_be_captured_silently(on_cuda):
    """A CUDA graph would keep the lengths of the batch that it was captured with. torch refuses their copy."""
    with applied(on_cuda()) as model, torch.no_grad():
        batch = batch_of()
        model(**batch, use_cache=False)
        torch.cuda.synchronize()
        with pytest.raises(RuntimeError, match="during CUDA graph capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            model(**batch, use_cache=False)


@pytest.mark.parametrize("backend", ["flash_attn", "torch_varlen", "flex", "sdpa"])
def test_every_backend_trains_like_alone(on_cuda, backend):
    """The gradients of float32 on the CPU, within upstream's own error in bfloat16 and luck in rounding."""
    if reason := BY_NAME[backend].refusal(Needs("cuda", torch.bfloat16, 64)):
        pytest.skip(reason)
    sequences = examples((5, 9, 1, 12))

    def make():
        return tiny_model(MACHINERY[0], hidden_size=384)

    exact = conformance.alone_loss_and_gradients(make, sequences)[1]
    upstream = conformance.alone_loss_and_gradients(on_cuda, [each.cuda() for each in sequences])[1]
    with applied(on_cuda(), backend=backend) as model:
        step(model, batch_of())
    for name, parameter in model.named_parameters():
        error = (parameter.grad.float().cpu() - exact[name]).norm()
        bound = (upstream[name].float().cpu() - exact[name]).norm()
        assert error < 2 * bound, f"{name}: {error:.1e}, upstream's {bound:.1e}"


@pytest.mark.parametrize("kind", FOUND)
def test_found_model_trains_like_alone(kind):
    """In float32: a router that rounds to another expert would say nothing. 2e-4 as in the promises; TF32 is off."""
    sequences = [each.cuda() for each in examples((5, 9, 1, 12))]
    loss, gradients = conformance.alone_loss_and_gradients(lambda: tiny_decoder(kind).cuda(), sequences)
    with applied(tiny_decoder(kind).cuda()) as model:
        found = step(model, batch_of())[0]
        torch.testing.assert_close(found, torch.as_tensor(loss).to(found), rtol=2e-5, atol=2e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=2e-4, atol=2e-4)


def test_a_found_step_of_kernels_never_waits():
    with applied(tiny_decoder("qwen3").cuda()) as model:
        step(model, batch_of())
        batch = batch_of((3, 17, 8), seed=2)
        torch.cuda.synchronize()
        with syncs() as messages:
            step(model, batch)
            assert not messages()
