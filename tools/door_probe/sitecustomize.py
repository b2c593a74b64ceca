"""Measures in every Python that finds this file whether the examples that a Trainer's model is given mix.

It shares nothing with padfree_patch, so that it can judge it. What the model received in the first training calls is
run again without gradient: once as it came, once with the tokens of one example replaced, and once with every example
alone. Where examples end is read from their end tokens, which the texts of tools/door_assets.py have nowhere else.

DOOR_PROBE names the file that gets a line of JSON for each training; without it, nothing happens.
"""

import json
import os

CALLS = 3
NOT_OF_LOGITS = ("labels", "shift_labels", "num_items_in_batch", "fused_lm_head", "logits_to_keep")
"""Arguments with which a model computes something beside its logits, or in their place."""


class Probe:
    """A forward pre-hook of the model that is trained."""

    def __init__(self, end, padding):
        self.end, self.padding = end, padding
        self.found, self.steps = [], False
        """`steps`: whether a training step has begun, and its first call is still to come."""

    def __call__(self, model, args, kwargs):
        import torch

        if not self.steps or len(self.found) == CALLS:
            return
        self.steps = False
        with torch.no_grad():
            self.found.append(self.measured(model, {**kwargs, "input_ids": args[0]} if args else dict(kwargs)))

    def measured(self, model, given):
        arguments = {name: value for name, value in given.items() if name not in NOT_OF_LOGITS}
        arguments["use_cache"] = False
        tokens = arguments["input_ids"]
        examples = [(row, span) for row in range(len(tokens)) for span in self.spans(tokens[row].tolist())]
        together = self.logits(model, arguments)
        apart = []
        for row, span in examples:
            alone = self.logits(model, {"input_ids": tokens[row : row + 1, span], "use_cache": False})
            apart.append((alone[0] - together[row, span]).abs().max().item())
        changed = tokens.clone()
        row, span = examples[0]
        changed[row, span] = (changed[row, span] + 7) % self.end  # the end token is the last of the vocabulary
        moved = (self.logits(model, {**arguments, "input_ids": changed}) - together).abs()
        others = [moved[other, where].max().item() for other, where in examples[1:]]
        rows = len({row for row, _ in examples})
        return {
            "examples": len(examples),
            "rows": rows,
            "alone": max(apart),
            "change": max(others, default=0.0),
            "labels": self.across(model, given, examples),
            "given": sorted(name for name, value in arguments.items() if value is not None),
        }

    def across(self, model, given, examples):
        """Returns how much the loss changes if no example's first token is predicted from the example before.

        None if the model computes no loss, or that of some tokens only, as in ms-swift: which are first is not known.
        """
        if given.get("labels") is None or given.get("logits_to_keep") is not None:
            return None
        ignored = {name: given[name].clone() for name in ("labels", "shift_labels") if given.get(name) is not None}
        for row, span in examples:
            if span.start:
                for name, labels in ignored.items():
                    labels[row, span.start - (name == "shift_labels")] = -100
        before, after = (model.forward(**{**given, **each}).loss for each in ({}, ignored))
        return None if before is None else abs(before.item() - after.item())

    def logits(self, model, arguments):
        return model.forward(**arguments).logits.float()  # past hooks, which have seen these arguments already

    def spans(self, row):
        """Returns where each example of a row stands, without padding; the last may have lost its end token."""
        ends = [place + 1 for place, token in enumerate(row) if token == self.end]
        while row and row[-1] == self.padding:
            row.pop()
        begins = [0, *ends]
        last = [(ends[-1] if ends else 0, len(row))] if not ends or ends[-1] < len(row) else []
        found = [slice(begin, end) for begin, end in [*zip(begins, ends), *last]]
        return [slice(begin_of(row, span, self.padding), span.stop) for span in found]


def begin_of(row, span, padding):
    """Returns where an example begins behind padding that stands before it."""
    begin = span.start
    while begin < span.stop - 1 and row[begin] == padding:
        begin += 1
    return begin


def probe_trainings(module):
    original, step = module.Trainer.train, module.Trainer.training_step

    def training_step(self, *args, **kwargs):
        self.door_probe.steps = True  # from here on it is no check of the door
        return step(self, *args, **kwargs)

    def train(self, *args, **kwargs):
        probe = self.door_probe = Probe(int(os.environ["DOOR_END"]), int(os.environ["DOOR_PADDING"]))
        hook = self.model.register_forward_pre_hook(probe, with_kwargs=True)
        try:
            return original(self, *args, **kwargs)
        finally:
            hook.remove()
            losses = [each["loss"] for each in self.state.log_history if "loss" in each]
            found = {"calls": probe.found, "losses": [float(loss) for loss in losses], "rank": self.args.process_index}
            with open(os.environ["DOOR_PROBE"], "a") as file:
                file.write(json.dumps({**found, "model": type(self.model).__name__}) + "\n")

    module.Trainer.train, module.Trainer.training_step = train, training_step


def find_flash_attention(module):
    module.is_flash_attn_2_available = lambda *args, **kwargs: True


def load_flash_attention(module):
    """Lets models load as flash_attention_2 on a CPU, where the stand-in of the tests computes."""
    module.PreTrainedModel._flash_attn_can_dispatch = lambda *args, **kwargs: True


if os.environ.get("DOOR_PROBE"):
    import wrapt

    wrapt.when_imported("transformers.trainer")(probe_trainings)
    if os.environ.get("DOOR_FLASH_ATTENTION"):  # for tools that take nothing else
        wrapt.when_imported("transformers.utils.import_utils")(find_flash_attention)
        wrapt.when_imported("transformers.modeling_utils")(load_flash_attention)
