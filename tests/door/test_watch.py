"""The door speaks where it cannot save: runs that are not packed, rows without boundaries, models left alone."""

from __future__ import annotations

import copy
import pickle
import re
import sys
import types

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from helpers.door import lines, made
from helpers.training import flattening, padding, trainer_of
from padfree_patch import PadfreeError, autopatch, patching, versions
from padfree_patch.door.watch import PATIENCE, Watch
from padfree_patch.testing import examples, pack

pytestmark = pytest.mark.versions


@pytest.fixture
def door():
    with autopatch() as handle:
        yield handle


@pytest.fixture
def tool(monkeypatch):
    """`tool("trl")` makes this a process that has imported a tool, and no other."""

    def imported(name):
        for each in ("llamafactory", "swift", "axolotl", "trl"):
            monkeypatch.delitem(sys.modules, each, raising=False)
        if name:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    return imported


def ids(rows, tokens):
    return torch.randint(3, 90, (rows, tokens))


def full(n):
    return {"input_ids": ids(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}


def bare(n):
    return {"input_ids": ids(1, 8 if n % 5 else 3)}  # the last row of each epoch is short


def of_other_lengths(n):
    return {"input_ids": ids(1, 5 + n)}


def padded(n):
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[0, 5:] = 0
    return {"input_ids": ids(2, 8), "attention_mask": mask}


@pytest.mark.parametrize(
    ("name", "batch", "said"),
    [
        ("trl", padded, "no row held a second example: this run is not packed. In trl, switch on padding_free=True or"),
        ("trl", full, "nothing says where an example ends .* In trl, switch on packing_strategy='bfd' instead of"),
        ("llamafactory", full, "In llamafactory, switch on neat_packing: true"),
        ("llamafactory", of_other_lengths, "not packed. In llamafactory, switch on packing: true"),
        ("swift", padded, "In swift, switch on --packing true or --padding_free true"),
        ("axolotl", padded, "In axolotl, switch on sample_packing: true"),
        (None, padded, r"In transformers, switch on data_collator=padfree_patch.DataCollatorWithFlattening\(\)"),
        (None, bare, "nothing says where an example ends .* switch on padfree_patch.pack_dataset"),
    ],
)
def test_what_to_switch_on_is_said_once_in_the_words_of_the_tool(door, capfd, recwarn, tool, name, batch, said):
    tool(name)
    model = made().train()
    for n in range(PATIENCE - 1):
        model(**batch(n))
    assert lines(capfd) == []
    for n in range(PATIENCE, PATIENCE + 15):
        model(**batch(n))
    (line,) = lines(capfd)
    assert re.search(said, line)
    assert "LlamaForCausalLM: 10 training batches" in line
    assert not [each for each in recwarn if "full rows" in str(each.message)]  # which would say it a second time


@pytest.mark.parametrize("call", ["packed", "evaluated", "isolated by its own mask"])
def test_nothing_is_said_of_a_run_that_is_packed_or_does_not_train(door, capfd, call):
    model = made().train(call != "evaluated")
    if call == "packed":
        model(**pack(examples((5, 4))))
    mask = torch.zeros(2, 1, 8, 8).masked_fill(torch.ones(8, 8).triu(1).bool(), torch.finfo(torch.float32).min)
    own = {"attention_mask": mask} if call == "isolated by its own mask" else {}
    if own and versions.transformers("<4.38"):
        pytest.skip("this transformers takes no such mask")
    for n in range(PATIENCE + 1):
        model(**{**full(n), **own})
    assert not [line for line in lines(capfd) if "training batches" in line]


def bert():
    """A model that is not causal."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForMaskedLM._from_config(BertConfig(vocab_size=90, **sizes))


def test_packed_training_row_of_a_model_that_was_left_alone_is_an_error(door, capfd, tmp_path):
    model = bert()
    trainer = trainer_of(model, tmp_path, flattening(), max_steps=1)
    with pytest.raises(PadfreeError, match="BertForMaskedLM was left unpatched, and is now trained on a packed row"):
        trainer.train()
    (line,) = lines(capfd)
    assert line.startswith("padfree-patch: BertForMaskedLM (bert) is left unpatched: BertForMaskedLM (model type")
    assert not patching.is_applied(model)


def test_with_strict_off_it_is_a_warning(capfd, tmp_path):
    with autopatch(strict=False):
        trainer = trainer_of(bert(), tmp_path, flattening(), max_steps=2)
        with pytest.warns(UserWarning, match="BertForMaskedLM was left unpatched.* would mix") as caught:
            trainer.train()
    assert len([each for each in caught if "left unpatched" in str(each.message)]) == 1


def test_padded_training_of_a_model_that_was_left_alone_goes_on(door, tmp_path):
    model = bert()
    trainer_of(model, tmp_path, padding, max_steps=2).train()
    with torch.no_grad():
        model(**pack(examples((5, 4))))


def test_copies_and_pickles_are_watched_too(door):
    model = made()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        hooks = [each for each in twin.base_model._forward_pre_hooks.values() if isinstance(each, Watch)]
        assert len(hooks) == 1 and hooks[0].who == "LlamaForCausalLM"
