"""Sequences that go on from shared prompts: every backend is right against float64 attention on the whole of each."""

from __future__ import annotations

import functools
import inspect
import sys
import types

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from helpers.attention_reference import SHARED, errors, random_qkv, reference
from padfree_patch import PackedSequences, PadfreeError, attention, versions
from padfree_patch.attention import Needs, cpu, cpu_prompts, flash_attn, flash_attn_3, flex, sdpa, torch_varlen
from padfree_patch.attention.prompts import seen_keys
from padfree_patch.testing import SyncCounter

LENGTHS = SHARED["lengths"]
WINDOWS = (0, 2, 5, 70, 201)


@pytest.fixture
def sequences():
    return PackedSequences.from_lengths(**SHARED)


@pytest.fixture(params=["cpu operators", "public function"])
def either_way(request, monkeypatch):
    """The sdpa backend with and without what is private to PyTorch on the CPU."""
    if request.param == "public function":
        monkeypatch.setattr(cpu, "works", lambda: False)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("window", WINDOWS)
def test_sdpa_equals_float64(either_way, sequences, softcap, window):
    qkv = random_qkv(4, 2, lengths=LENGTHS)
    found = errors(qkv, sequences, scale=0.35, window=window, softcap=softcap)
    assert max(found) < 100 * torch.finfo(torch.float32).eps


def test_sequences_without_their_prompts_are_noticed(sequences):
    """The control of all tests here."""
    alone = PackedSequences.from_lengths(LENGTHS)
    qkv = random_qkv(4, 2, lengths=LENGTHS)
    found = errors(qkv, sequences, attend=lambda q, k, v, _, **options: sdpa.attend(q, k, v, alone, **options), scale=1)
    assert min(found) > 0.1


@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_only_the_result(sequences, dtype, window):
    found = errors(random_qkv(4, 2, 64, lengths=LENGTHS, dtype=dtype), sequences, scale=0.35, window=window)
    assert max(found) < 1.5 * torch.finfo(dtype).eps  # as in test_sdpa.py


def test_neighbours_change_nothing_in_any_bit(sequences):
    """Neither other prompts nor other answers to the same prompt."""
    qkv = random_qkv(4, 2, lengths=LENGTHS)
    before = sdpa.attend(*qkv, sequences, scale=0.3).split(list(LENGTHS))
    with torch.no_grad():
        for x in qkv:
            for changed in (2, 3, 4):
                x.split(list(LENGTHS))[changed].normal_()
    after = sdpa.attend(*qkv, sequences, scale=0.3).split(list(LENGTHS))
    assert [i for i, pair in enumerate(zip(before, after)) if not torch.equal(*pair)] == [2, 3, 4, 5, 6]


@pytest.mark.parametrize(("window", "queries"), [(0, [5, 7]), (300, [2, 3, 5, 2])])
def test_cpu_asks_once_what_sequences_see_of_their_prompt(monkeypatch, window, queries):
    """With a window, each sees another part of it."""
    seen = []

    def counted(function, *args, **options):
        seen.append(args[0].shape[2])
        return function(*args, **options)

    for name in ("flash_forward", "flash_backward"):
        monkeypatch.setattr(cpu_prompts, name, functools.partial(counted, getattr(cpu_prompts, name)))
    sequences = PackedSequences.from_lengths((7, 2, 3, 4, 5, 2), prefixes=(-1, 0, 0, -1, 3, 3))
    qkv = random_qkv(4, 2, lengths=sequences.lengths)
    cpu.attend(*qkv, sequences, scale=0.3, window=window).sum().backward()
    assert seen == queries * 2  # forward and backward


def test_gradients_have_gradients(sequences):
    qkv = random_qkv(4, 2, lengths=LENGTHS, dtype=torch.float64)
    weights = torch.randn(sum(LENGTHS), 4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def second(attend):
        gradients = torch.autograd.grad((attend(*qkv, sequences, scale=0.3) * weights).sum(), qkv, create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in gradients), qkv)

    for found, expected in zip(second(sdpa.attend), second(reference)):
        torch.testing.assert_close(found, expected)


def test_one_autograd_node_whatever_is_shared(sequences):
    output = sdpa.attend(*random_qkv(lengths=LENGTHS), sequences, scale=1.0)
    assert {type(node).__name__ for node, _ in output.grad_fn.next_functions} == {"AccumulateGrad"}


def varlen(q, k, v, cu_q, cu_k, *, window, scale):
    """Computes what a varlen kernel does whose causal mask ends with the last key."""
    outputs = []
    for i in range(len(cu_q) - 1):
        q_, k_, v_ = (x[cu[i] : cu[i + 1]].double() for x, cu in ((q, cu_q), (k, cu_k), (v, cu_k)))
        k_, v_ = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k_, v_))
        position = torch.arange(len(k_))
        distance = position[len(k_) - len(q_) :, None] - position
        hidden = (distance < 0) | (distance >= (window or len(k_)))
        scores = torch.einsum("qhd,khd->hqk", q_, k_) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v_))
    return torch.cat(outputs).to(q.dtype)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("backend", [flash_attn, flash_attn_3], ids=lambda backend: backend.NAME)
def test_flash_attn_gets_the_keys_of_the_prompt_before_each_sequence(monkeypatch, sequences, backend, window):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1),
    ):  # fmt: skip
        assert causal and max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
        return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, window=window_size[0] + 1, scale=softmax_scale)

    there = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    for module in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, module, there)
    if "dropout_p" not in inspect.signature(backend.attend).parameters and backend is flash_attn_3:
        kept = flash_attn_varlen_func
        there.flash_attn_varlen_func = lambda *args, **kwargs: kept(*args, **kwargs)
    qkv = random_qkv(4, 2, lengths=LENGTHS)
    assert max(errors(qkv, sequences, attend=backend.attend, scale=0.3, window=window)) < 1e-5


@pytest.mark.parametrize("window", WINDOWS)
def test_torch_varlen_gets_them_too(monkeypatch, sequences, window):
    def varlen_attn(q, k, v, *, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, enable_gqa=False):
        assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max() and window_size[1] == 0
        return varlen(q, k, v, cu_seq_q, cu_seq_k, window=window_size[0] + 1, scale=scale)

    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", types.SimpleNamespace(varlen_attn=varlen_attn))
    qkv = random_qkv(4, 2, lengths=LENGTHS)
    assert max(errors(qkv, sequences, attend=torch_varlen.attend, scale=0.3, window=window)) < 1e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("window", [0, 70])
def test_flex_equals_float64(monkeypatch, sequences, window):
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "compiled_flex_attention", lambda: torch_flex.flex_attention)
    qkv = random_qkv(4, 2, 16, lengths=LENGTHS)
    assert max(errors(qkv, sequences, attend=flex.attend, scale=0.3, window=window)) < 1e-5


@pytest.mark.parametrize("window", WINDOWS)
def test_flex_visits_only_the_blocks_in_which_something_is_seen(sequences, window):
    shared = PackedSequences.from_lengths((300, 5, 200, 130, 400, 260), prefixes=(-1, 0, 0, -1, 0, 3))
    for each in (sequences, shared):
        owner = torch.repeat_interleave(torch.arange(len(each)), torch.tensor(each.lengths))
        prompt = torch.tensor(each.prefixes)[owner]
        place, position = torch.arange(each.total), each.position_ids()
        own = (owner[:, None] == owner) & (place[:, None] >= place)
        distance = position[:, None] - position
        visible = (own | (prompt[:, None] == owner)) & (distance < (window or each.total))
        mask = flex.block_mask(each, window)
        assert torch.equal(mask.mask_mod(0, 0, place[:, None], place[None, :]), visible)
        blocks = -(-each.total // flex.BLOCK)
        padded = torch.zeros(blocks * flex.BLOCK, blocks * flex.BLOCK, dtype=torch.bool)
        padded[: each.total, : each.total] = visible
        needed = padded.view(blocks, flex.BLOCK, blocks, flex.BLOCK).any(3).any(1)
        assert torch.equal(mask.to_dense()[0, 0] != 0, needed)


def test_keys_are_worked_out_once_without_a_sync(sequences):
    with SyncCounter() as syncs:
        first = seen_keys(sequences)
        flex.block_mask(sequences)
    assert syncs.total == 0
    assert seen_keys(sequences) is first and first.total == sum(sequences.whole_lengths)


def test_a_backend_that_knows_no_prompts_refuses(monkeypatch):
    attention.select.cache_clear()
    needs = Needs("cpu", torch.float32, 8, prompts=True)
    assert attention.select(needs) is sdpa
    attention.select.cache_clear()
    monkeypatch.setattr(sdpa, "KNOWS_PROMPTS", False)
    with pytest.raises(PadfreeError, match=r"prompts=True:(\n.*)*sdpa: knows no prompts that sequences share"):
        attention.select(needs)
    attention.select.cache_clear()


def test_flash_attn_whose_causal_mask_begins_with_the_first_key_refuses(monkeypatch):
    there = types.SimpleNamespace(flash_attn_varlen_func=lambda q, k, v: None)
    monkeypatch.setitem(sys.modules, "flash_attn", there)
    needs = Needs("cuda", torch.bfloat16, 64, prompts=True)
    for version, refused in (("2.0.9", True), ("2.1", False)):
        monkeypatch.setattr(versions, "installed", lambda _, found=version: versions.Version(found))
        assert ("need flash-attn >= 2.1" in (flash_attn.refusal(needs) or "")) == refused
