"""The probes: a packed row of two random examples, run in the ways that would show a leak."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from ..batch.labels import IGNORED_LABEL
from ..models import pretrained_modules
from ..seams.model_call import needs_rows
from ..seams.rotary import as_new
from .dtypes import Dtypes
from .entry import Entry
from .first_leak import first_difference, first_leak
from .untouched import random_state_put_back, states_put_back

LENGTHS = (9, 8)
"""Tokens of examples A and B."""

TOLERANCE_EPS = 170
"""Packed against alone, relative to the largest logit, in units of the dtype's eps: 2e-5 in float32. Packed and alone
differ by the order of additions (other matmul shapes), a few eps per layer; a leak moves logits by 1e-2 and more."""


COARSE, OWN_ROUNDINGS = 1e-4, 3.0
"""From which eps on the bound follows the model's own rounding, and how many of it may be: in bfloat16 that rounding is
0.01 of the largest logit for one model, and 0.1 for a router that flips. Packed is off by 0.2 to 0.6 of it."""


class Probe:
    """Two random examples A and B, and another A of the same length, as token ids (1, tokens).

    They begin and end as texts do, with the model's own tokens for that: what looks for these in a row finds them in
    the middle of it. The graph begins at the embeddings, which require gradients, as in training: token ids have none.
    Without gradients, on some CPUs, bitsandbytes' 4-bit layers take a path for inference that rounds to bfloat16 and
    rewrites the weights, so that they can't be trained any more.
    """

    def __init__(self, model: nn.Module, autocast: AbstractContextManager[object] | None = None):
        """Takes the model, and the autocast to run it under; None for one only if the model can't run without."""
        outermost = pretrained_modules(model)[0]
        self.model = cast(nn.Module, outermost.base_model) if needs_rows(outermost) else model
        self._entry = Entry(self.model, outermost)
        self.a, self.b, self.other_a = self._entry.random_texts(*LENGTHS, LENGTHS[0])
        self.positions = torch.cat([torch.arange(n, device=self.a.device) for n in LENGTHS]).unsqueeze(0)
        self.autocast: AbstractContextManager[object] = autocast or nullcontext()
        if autocast is None:
            self.autocast = self._autocast_if_needed(self.a.device.type)

    def _autocast_if_needed(self, device_type: str) -> AbstractContextManager[object]:
        """Chooses autocast for norms in float32 beside weights in bfloat16: trained, and so run, under it."""
        dtypes = {parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point()}
        if len(dtypes) > 1:
            try:
                self.alone(self.b)
            except RuntimeError:
                return torch.autocast(device_type, max(dtypes, key=lambda dtype: torch.finfo(dtype).eps))
        return nullcontext()

    def logits(self, tokens: Tensor, **options: object) -> Tensor:
        """Runs the model; gives its logits, or a decoder's hidden states."""
        with self._as_every_other():
            return self._entry.call(tokens, **options)

    @contextmanager
    def _as_every_other(self) -> Iterator[None]:
        """Lets a call find what every other one finds: no state of the one before, and the same random numbers.

        PEFT's Arrow draws some in its first call. Rotaries are as new: if they kept the longest sequence so far, it
        would decide how the others are rotated.
        """
        with as_new(self.model), states_put_back(self.model), random_state_put_back(self.model), self.autocast:
            yield

    def alone(self, tokens: Tensor) -> Tensor:
        """Runs one example as in a padded batch: with a mask, without which Falcon's ALiBi on sdpa sees later tokens.

        Falcon is like that from 4.36 to 4.39. And without a cache, as packed rows are run: with one, RecurrentGemma of
        4.x sees later tokens of a text that is longer than its window.
        """
        return self.logits(tokens, attention_mask=torch.ones_like(tokens), **self._entry.without_cache())

    def packed(self, a: Tensor, **options: bool) -> Tensor:
        """Runs an A and B in one row."""
        return self.logits(torch.cat([a, self.b], dim=1), position_ids=self.positions, **options)

    @cached_property
    def row(self) -> Tensor:
        """The logits of A and B in one row, run once for all that is compared with them."""
        return self.packed(self.a).detach()

    def logit_changes(self) -> tuple[float, float]:
        """Measures how far A's logits move when A changes, and how far B's do."""
        moved = self.row - self.packed(self.other_a)
        return largest(moved[:, : LENGTHS[0]]), largest(moved[:, LENGTHS[0] :])

    def leaked_gradient(self) -> float:
        """Measures the gradient of B's loss at A's embeddings."""
        with _frozen(self.model):
            loss = self.packed(self.a)[:, LENGTHS[0] :].float().square().sum()
            loss.backward()  # not autograd.grad, which reentrant checkpointing refuses
        worst, seen = 0.0, 0
        for leaf in self._entry.embeddings:  # one of the whole row, or one for each sequence
            if leaf.grad is not None and seen < LENGTHS[0]:
                worst = max(worst, largest(leaf.grad[:, : LENGTHS[0] - seen]))
            seen += leaf.shape[1]
        return worst

    def gradients(self, *, use_cache: bool | None = None) -> Tensor:
        """Measures the largest gradient of each token's outputs at each token's embedding: (tokens, tokens).

        `use_cache` is what the call says of it; None says nothing.
        """
        options = {} if use_cache is None else {"use_cache": use_cache}
        with _frozen(self.model):
            outputs = self.packed(self.a, **options)[0].float().flatten(1)
            return torch.stack([self._gradient_at_tokens(each.square().sum()) for each in outputs])

    def _gradient_at_tokens(self, loss: Tensor) -> Tensor:
        """Returns the largest gradient of a loss at the embedding of each token of the row, (tokens,)."""
        loss.backward(retain_graph=True)
        found = []
        for leaf in self._entry.embeddings:  # one of the whole row, or one for each sequence
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            found.append(gradient[0].float().abs().amax(-1))
            leaf.grad = None
        return torch.cat(found)[: sum(LENGTHS)]

    def alone_error(self) -> tuple[float, float]:
        """Measures the relative difference between packed and alone; gives it, and what it may be."""
        with Dtypes() as computed:
            alone = torch.cat([self.alone(each) for each in (self.a, self.b)], dim=1)
        finest = torch.promote_types(alone.dtype, torch.float32)
        error = largest(self.row.to(finest) - alone.to(finest)) / max(largest(alone), torch.finfo(torch.float32).tiny)
        return error, self.tolerance(computed, alone)

    def tolerance(self, computed: Dtypes, logits: Tensor) -> float:
        """Returns how far packed may be from alone, over the largest logit, by the dtypes that were computed in."""
        eps = max(torch.finfo(dtype).eps for dtype in computed.seen | {logits.dtype})
        # Where weights are int8, so are what they are multiplied with: bitsandbytes rounds each token's activations.
        if any(isinstance(each, nn.Linear) and each.weight.dtype == torch.int8 for each in self.model.modules()):
            return min(TOLERANCE_EPS * max(eps, 2.0**-7), 0.1)
        if eps < COARSE:
            return TOLERANCE_EPS * eps
        return min(max(OWN_ROUNDINGS * self.own_rounding(), 0.02), 0.5)

    def own_rounding(self) -> float:
        """Measures how far B alone moves if everything that a weight gives is one eps off, up or down at random."""
        generator = torch.Generator().manual_seed(0)

        def nudge(module: nn.Module, args: object, output: object) -> Tensor | None:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return None
            signs = torch.randint(0, 2, output.shape, generator=generator, device="cpu") * 2 - 1
            return output * (1 + torch.finfo(output.dtype).eps * signs.to(output))

        exact = self.alone(self.b)
        with ExitStack() as hooks:
            for each in self.model.modules():
                if not any(each.children()) and any(True for _ in each.parameters(recurse=False)):
                    hooks.callback(each.register_forward_hook(nudge).remove)
            moved = self.alone(self.b)
        return largest(moved.detach().float() - exact.detach().float()) / max(
            largest(exact), torch.finfo(torch.float32).tiny
        )

    def without_gradients(self) -> AbstractContextManager[object]:
        """Returns what keeps a graph from being made, unless the model has 4-bit layers of bitsandbytes (see above)."""
        in_4_bits = any(type(each).__name__ == "Params4bit" for each in self.model.parameters())
        return nullcontext() if in_4_bits else torch.no_grad()

    def loss_of_first_label(self) -> float | None:
        """Computes the loss of B alone if only its first token has a label; None if the model computes none."""
        labels = torch.full_like(self.b, -100)
        labels[0, 0] = self.b[0, 0]
        with self.autocast:
            try:
                loss = self._entry.loss(self.b, labels)
            except Exception:  # upstream's own, such as of a head that wants other labels
                return None
        return None if loss is None else float(loss)

    def loss_and_gradients(self) -> tuple[Tensor, list[Tensor]] | None:
        """Runs A and B in one row, some of whose tokens have labels.

        Returns the loss (), and its gradients at the embeddings and at the head's parameters that are trained; None if
        the model computes no loss.
        """
        tokens = torch.cat([self.a, self.b], dim=1)
        labels = tokens.clone()
        labels[:, :4] = labels[:, 12] = IGNORED_LABEL
        trained = [each for each in _head_parameters(self.model) if each.requires_grad]
        with _frozen(self.model), self._as_every_other():
            for parameter in trained:
                parameter.requires_grad_(True)
            loss = self._entry.loss(tokens, labels, position_ids=self.positions)
            if loss is None:
                return None
            loss.backward()
            leaves = [*self._entry.embeddings, *trained]
            return loss.detach(), [each.grad for each in leaves if each.grad is not None]

    def change_by_later_token(self) -> float:
        """Measures how far the outputs of A change before a token that is another one: its last, or its second.

        A prefix that sees itself whole shows by the second.
        """
        some, changes = self.alone(self.a), []
        for place, token in ((LENGTHS[0] - 1, self.a[:, 1]), (1, self.a[:, 2])):
            other = self.a.clone()
            other[:, place] = token
            changes.append(largest((some - self.alone(other))[:, :place]))
        return max(changes)

    def first_difference(self) -> str | None:
        """Names the first module that gives B something else in the packed row than alone, for the same input."""
        alone, packed = (lambda: self.alone(self.b)), (lambda: self.packed(self.a))
        return first_difference(self.model, packed, alone, LENGTHS)

    def first_leak(self) -> str | None:
        """Names the first module that carries something from A to B."""
        return first_leak(self.model, self.packed, self.a, self.other_a, LENGTHS[1])


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Lets a backward leave no gradients at the parameters; those of X-LoRA are switched on again by its forward."""
    before = [(each, each.requires_grad, each.grad) for each in model.parameters() if each.is_leaf]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        yield
    finally:
        for parameter, trained, gradient in before:
            parameter.requires_grad_(trained)
            parameter.grad = gradient


def _head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters of the module that makes logits, with what PEFT has put into it."""
    outermost = pretrained_modules(model)[0]
    try:
        head = outermost.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return []
    return list(head.parameters()) if isinstance(head, nn.Module) else []


def largest(values: Tensor) -> float:
    """Gives the largest magnitude; NaN stays NaN, which is never 0."""
    return values.detach().float().abs().max().item()
