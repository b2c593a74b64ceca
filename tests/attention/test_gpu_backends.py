"""Backends whose kernels need a GPU: called as the real packages' signatures say, right as far as a CPU can tell."""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention as torch_flex

from helpers.attention_reference import LENGTHS, LONG, errors, random_qkv, reference
from padfree_patch import PackedSequences, attention, versions
from padfree_patch.attention import Needs, flash_attn, flash_attn_3, flex, torch_varlen
from padfree_patch.testing import LargestTensor, SyncCounter

SIGNATURES = json.loads(Path(__file__).with_name("signatures.json").read_text())
CUDA = Needs("cuda", torch.bfloat16, 64)


@pytest.fixture(autouse=True)
def selecting_anew():
    attention.select.cache_clear()
    yield
    attention.select.cache_clear()


def with_signature(parameters, calls):
    """Makes a function of only these parameters; it computes attention in float64 and adds each call to `calls`."""
    kinds = inspect.Parameter
    signature = inspect.Signature(
        [
            kinds(name, kinds.POSITIONAL_OR_KEYWORD, default=kinds.empty if default is None else eval(default))
            for name, default in parameters
        ]
    )

    def function(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        calls.append(dict(bound.arguments))
        bound.apply_defaults()
        given = bound.arguments
        assert given["causal"] and given["cu_seqlens_q"] is given["cu_seqlens_k"]
        assert given["max_seqlen_q"] == given["max_seqlen_k"] == max(given["cu_seqlens_q"].diff().tolist())
        sequences = PackedSequences.from_cu_seqlens(given["cu_seqlens_q"])
        left, right = given.get("window_size", (-1, -1))
        assert (left, right) == (-1, -1) or (left >= 0 and right == 0)
        options = {"scale": given["softmax_scale"], "window": left + 1, "softcap": given.get("softcap", 0.0)}
        return reference(given["q"], given["k"], given["v"], sequences, **options).to(given["q"].dtype)

    function.__signature__ = signature
    return function


@pytest.fixture(params=SIGNATURES)
def package(request, monkeypatch):
    """Gives a backend, the version of its package whose signature it finds, and a list of the calls to that."""
    name, version = request.param.split(" of flash-attn ")
    calls = []
    function = with_signature(SIGNATURES[request.param], calls)
    backend, module = {
        "flash_attn": (flash_attn, "flash_attn"),
        "flash_attn_3": (flash_attn_3, "flash_attn_interface"),
    }[name]
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(flash_attn_varlen_func=function))
    monkeypatch.setattr(versions, "installed", lambda _: versions.Version(version))
    return backend, versions.Version(version), calls


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"softcap": 3.0}, {"window": 4, "softcap": 3.0}], ids=str)
def test_every_version_of_a_package_gets_arguments_it_takes_or_is_refused(package, options):
    backend, version, calls = package
    sequences = PackedSequences.from_lengths(LENGTHS)
    reason = backend.refusal(Needs("cuda", torch.bfloat16, 8, **options))
    first = {flash_attn: {"window": "2.3", "softcap": "2.6"}, flash_attn_3: {"window": "2.8", "softcap": "2.8"}}[
        backend
    ]
    since = [first[option] for option in options] + (["2.8"] if backend is flash_attn_3 and version.minor == 7 else [])
    if any(version < versions.Version(release) for release in since):
        assert any(release in reason for release in since)
        return
    assert reason is None
    qkv = random_qkv()
    output = backend.attend(*qkv, sequences, scale=0.3, **options)
    torch.testing.assert_close(output, reference(*qkv, sequences, scale=0.3, **options).float())
    (call,) = calls
    assert call.get("dropout_p", 0.0) == 0.0


def test_the_stub_of_a_signature_refuses_what_is_not_in_it():
    """The control of the test before."""
    parameters = SIGNATURES["flash_attn of flash-attn 2.0.9"]
    required = {name: None for name, default in parameters if default is None}
    with pytest.raises(TypeError, match="window_size"):
        with_signature(parameters, [])(**required, window_size=(3, 0))


@pytest.mark.parametrize(
    ("backend", "needs", "reason"),
    [
        (flash_attn_3, CUDA, "package flash_attn_3 is not installed"),
        (torch_varlen, Needs("cpu", torch.bfloat16, 64), "needs tensors on cuda, found cpu"),
        (torch_varlen, Needs("cuda", torch.float32, 64), "needs float16 or bfloat16, found float32"),
        (torch_varlen, Needs("cuda", torch.bfloat16, 64, dropout=0.1), "varlen_attn has no dropout"),
        (torch_varlen, Needs("cuda", torch.bfloat16, 64, softcap=9.0), "varlen_attn has no softcap"),
        (flex, Needs("cpu", torch.float32, 64), "no backward on the CPU"),
        (flex, Needs("mps", torch.float32, 64), "no kernel for mps"),
        (flex, Needs("cuda", torch.float64, 64), "no kernel for float64"),
    ],
)
def test_backends_refuse_with_the_reason(backend, needs, reason):
    assert reason in backend.refusal(needs)


def test_flash_attn_3_has_no_dropout(monkeypatch):
    function = with_signature(SIGNATURES["flash_attn_3 of flash-attn 2.8.3"], [])
    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.SimpleNamespace(flash_attn_varlen_func=function))
    assert flash_attn_3.refusal(CUDA) is None
    assert "no dropout" in flash_attn_3.refusal(Needs("cuda", torch.bfloat16, 64, dropout=0.1))


@pytest.mark.parametrize("older", ["none", "2.10"])
def test_torch_without_what_torch_varlen_needs_is_refused(monkeypatch, older):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None): ...

    there = types.SimpleNamespace(varlen_attn=varlen_attn) if older == "2.10" else None
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", there)
    expected = {"none": "needs torch.nn.attention.varlen (torch >= 2.10)", "2.10": "takes no scale, window_size"}
    assert expected[older] in torch_varlen.refusal(CUDA)


def test_old_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability 8.0 (Ampere) or newer, found 7.5" in torch_varlen.refusal(CUDA)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("key_heads", [2, 6])
def test_torch_varlen_is_called_as_the_real_function_says(monkeypatch, window, key_heads):
    """Runs torch's function up to its operator, which has no CPU kernel, and looks at what the kernel would get."""
    calls = []
    importlib.import_module("torch.nn.attention.varlen")  # registers the operator
    names = [argument.name for argument in torch.ops.torch_attn._varlen_attn.default._schema.arguments]
    sequences = PackedSequences.from_lengths(LENGTHS)
    qkv = random_qkv(key_heads=key_heads)

    def operator(*args):
        assert len(args) <= len(names)
        given = dict(zip(names, args))
        calls.append(given)
        left = given["window_size"][0]
        sequences = PackedSequences.from_cu_seqlens(given["cu_seq_q"])
        assert given["cu_seq_k"] is given["cu_seq_q"] and given["max_k"] == given["max_q"]
        output = reference(*args[:3], sequences, scale=given["scale"], window=left + 1)
        return output.float(), None, None

    monkeypatch.setattr(torch.ops, "torch_attn", types.SimpleNamespace(_varlen_attn=operator))
    output = torch_varlen.attend(*qkv, sequences, scale=0.3, window=window)
    torch.testing.assert_close(output, reference(*qkv, sequences, scale=0.3, window=window).float())
    (call,) = calls
    assert call["window_size"] == ([window - 1, 0] if window else [-1, 0])
    assert call["is_causal"] == (not window)  # a window of (tokens, 0) is causal by itself
    assert call["enable_gqa"] == (key_heads != 6) and call["max_q"] == max(LENGTHS)


@pytest.fixture
def uncompiled(monkeypatch):
    """Lets torch compute FlexAttention without a compiler, on all scores; so its backward runs on the CPU as well."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "compiled_flex_attention", lambda: torch_flex.flex_attention)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("options", [{}, {"window": 4}, {"window": 140}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("key_heads", [2, 4])
def test_flex_equals_float64(uncompiled, options, key_heads):
    lengths = (5, 1, 130, 300, 64)
    qkv = random_qkv(4, key_heads, 16, lengths=lengths)
    assert max(errors(qkv, PackedSequences.from_lengths(lengths), attend=flex.attend, scale=0.3, **options)) < 1e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_gives_its_kernel_values_of_at_least_16_channels(uncompiled, monkeypatch):
    sizes = []

    def kernel(q, k, v, **options):
        sizes.append(v.shape[-1])
        return torch_flex.flex_attention(q, k, v, **options)

    sequences = PackedSequences.from_lengths((5, 1))
    q, k, v = torch.randn(3, 6, 2, 24, dtype=torch.float64)
    expected = flex.attend(q, k, v, sequences, scale=0.3)[..., :12]
    monkeypatch.setattr(flex, "compiled_flex_attention", lambda: kernel)
    torch.testing.assert_close(flex.attend(q, k, v[..., :12], sequences, scale=0.3), expected)
    assert sizes == [16]


@pytest.mark.parametrize("window", [0, 1, 100, 128, 129, 500])
@pytest.mark.parametrize("lengths", [LENGTHS, LONG, (128, 256), (1,)], ids=len)
def test_flex_visits_only_the_blocks_in_which_something_is_seen(window, lengths):
    sequences = PackedSequences.from_lengths(lengths)
    mask = flex.block_mask(sequences, window)
    tokens = torch.arange(sequences.total)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = tokens[:, None] - tokens
    visible = (owner[:, None] == owner) & (distance >= 0) & (distance < (window or sequences.total))
    assert torch.equal(mask.mask_mod(0, 0, tokens[:, None], tokens[None, :]), visible)
    blocks = -(-sequences.total // flex.BLOCK)
    padded = torch.zeros(blocks * flex.BLOCK, blocks * flex.BLOCK, dtype=torch.bool)
    padded[: sequences.total, : sequences.total] = visible
    needed = padded.view(blocks, flex.BLOCK, blocks, flex.BLOCK).any(3).any(1)
    assert torch.equal(mask.to_dense()[0, 0] != 0, needed)


def test_flex_makes_its_mask_once_without_a_sync_or_a_tensor_of_tokens_squared():
    given = PackedSequences.from_lengths([256] * 64)
    sequences = PackedSequences(given.cu_seqlens, given.max_seqlen, given.total)  # whose lengths only the device has
    with SyncCounter() as syncs, LargestTensor() as largest:
        first = flex.block_mask(sequences)
    assert syncs.total == 0
    assert largest.elements <= 2 * sequences.total
    assert flex.block_mask(sequences) is first
    assert flex.block_mask(sequences, 100) is not first


def test_every_mix_of_options_is_compiled(uncompiled, monkeypatch):
    """PyTorch's limit is eight graphs, and its symbol for a second softcap does not compile (seen on an H200)."""
    compiled = torch.compile(torch_flex.flex_attention, dynamic=True, fullgraph=True, backend="eager")
    monkeypatch.setattr(flex, "compiled_flex_attention", lambda: compiled)
    sequences = PackedSequences.from_lengths(LENGTHS)
    graphs = set()
    for window, softcap, trained in itertools.product((0, 4), (0.0, 2.0, 3.0), (False, True)):
        qkv = [each.float().detach().requires_grad_(trained) for each in random_qkv(4, 2, 16)]
        with torch.set_grad_enabled(trained):
            output = flex.attend(*qkv, sequences, scale=0.3, window=window, softcap=softcap)
        expected = reference(*qkv, sequences, scale=0.3, window=window, softcap=softcap)
        torch.testing.assert_close(output, expected.float())
        graphs.add((window, softcap, trained))
    assert len(graphs) > 8


def test_flex_is_not_compiled_again_for_every_batch(uncompiled, monkeypatch):
    """After eight graphs torch stops compiling, and would then compute T x T scores."""
    counter = CompileCounter()
    compiled = torch.compile(torch_flex.flex_attention, dynamic=True, backend=counter)
    monkeypatch.setattr(flex, "compiled_flex_attention", lambda: compiled)
    graphs = []
    for lengths in [(5, 1, 130), (300, 64), (7, 7, 500, 90), (1000,), (129,)]:
        qkv = random_qkv(4, 2, 16, lengths=lengths)
        sequences = PackedSequences.from_lengths(lengths)
        torch.testing.assert_close(
            flex.attend(*qkv, sequences, scale=0.3), reference(*qkv, sequences, scale=0.3).float()
        )
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[-1] <= 3
