"""How a probe calls somebody's model: with token ids where they are taken, through whatever is wrapped around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from ..adapters import needs_task_ids
from ..batch.lengths import LENGTH_ARGUMENTS
from ..errors import PadfreeError
from ..models import is_transformers_model


def why_not_called_with_tokens(model: nn.Module) -> str | None:
    """Says what a module's forward takes, if nobody but its author can call it with tokens; None if a probe can."""
    parameters = inspect.signature(model.forward).parameters
    if any(name in parameters for name in _TOKENS) or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return f"takes {', '.join(parameters)}, and no input_ids"


_TOKENS = ("input_ids", "inputs_embeds")


class Entry:
    """The outermost forward that a caller would call, and the embedding at which the gradient's graph begins."""

    def __init__(self, model: nn.Module, outermost: nn.Module):
        """Takes the module to call, and the outermost transformers model in it.

        Raises PadfreeError if it can't be called with tokens.
        """
        self._model, self._config = model, outermost.config
        self._embed = cast(Callable[[], nn.Module], outermost.get_input_embeddings)()
        self._parameters = inspect.signature(model.forward).parameters
        self._has_tasks = needs_task_ids(model)
        self._by_ids = self._takes("input_ids")
        self.embeddings: list[Tensor] = []
        """What the embedding gave in the last call, (1, T, D) each: the leaves at which its graph begins."""
        if reason := why_not_called_with_tokens(model):
            raise self._refusal(reason)

    def _takes(self, name: str) -> bool:
        return name in self._parameters or any(each.kind is each.VAR_KEYWORD for each in self._parameters.values())

    def without_cache(self) -> dict[str, bool]:
        """Returns the argument that keeps the model from filling a cache, if it names one."""
        return {"use_cache": False} if "use_cache" in self._parameters else {}

    def random_texts(self, *lengths: int) -> list[Tensor]:
        """Draws token ids (1, length) each, with the model's first and last token of a text at the ends."""
        weight = next(self._embed.parameters())  # of the embedding itself, whatever PEFT has put around it
        generator = torch.Generator().manual_seed(0)
        with torch.device("cpu"):  # whatever the default device is, the generator is there
            texts = [torch.randint(weight.shape[0], (1, n), generator=generator) for n in lengths]
        for name, place in (("bos_token_id", 0), ("eos_token_id", -1)):
            token = getattr(self._config, name, None)
            if isinstance(token, int) and 0 <= token < weight.shape[0]:
                for text in texts:
                    text[0, place] = token
        return [text.to(weight.device) for text in texts]

    def call(self, tokens: Tensor, **options: object) -> Tensor:
        """Runs the model on token ids (B, T); returns its logits, (B, T, ...). Fills `embeddings`.

        Raises PadfreeError if nothing of what comes out is for each token.
        """
        results = _tensors(self._run(tokens, self._accepted(options, tokens.device)))
        for result in results:
            if result.shape[:2] == tokens.shape:
                return result
        shapes = ", ".join(str(tuple(each.shape)) for each in results) or "none"
        raise self._refusal(f"gives, for tokens of shape {tuple(tokens.shape)}, tensors of other shapes: {shapes}")

    def loss(self, tokens: Tensor, labels: Tensor, **options: object) -> Tensor | None:
        """Returns the loss () that the model computes of labels (1, T), or None if none. Fills `embeddings`."""
        if not self._takes("labels"):
            return None
        output = self._run(tokens, {**self._accepted(options, tokens.device), "labels": labels})
        loss = output.get("loss") if isinstance(output, dict) else None
        return loss if isinstance(loss, Tensor) and loss.dim() == 0 else None

    def _accepted(self, options: dict[str, object], device: torch.device) -> dict[str, object]:
        """Returns what the forward takes; positions that it does not take become segment numbers in the mask."""
        # Lengths are given to patched models only, whose forwards take them whatever they name.
        given = {name: value for name, value in options.items() if self._takes(name) or name in LENGTH_ARGUMENTS}
        positions = options.get("position_ids")
        if isinstance(positions, Tensor) and "position_ids" not in given:
            if not self._takes("attention_mask"):
                raise self._refusal(f"takes {', '.join(self._parameters)}, and nothing that says where examples end")
            given["attention_mask"] = (positions == 0).cumsum(1)
        if self._has_tasks:
            given["task_ids"] = torch.zeros(1, dtype=torch.int64, device=device)
        return given

    def _run(self, tokens: Tensor, options: dict[str, object]) -> object:
        with self._graph_cut_at_embeddings():
            if self._by_ids:
                output = self._called(input_ids=tokens, **options)
                if self.embeddings:
                    return output
                self._by_ids = False  # it does not call the embedding, so that no gradient would begin there
            return self._called(inputs_embeds=self._embed(tokens), **options)

    def _called(self, **options: object) -> object:
        """Calls the model with arguments by name, but those by position that its forward takes in no other way."""
        only = [name for name, each in self._parameters.items() if each.kind is each.POSITIONAL_ONLY]
        given = [options.pop(name) if name in options else self._parameters[name].default for name in only]
        return self._model(*given, **options)

    @contextmanager
    def _graph_cut_at_embeddings(self) -> Iterator[None]:
        self.embeddings = []

        def cut(module: nn.Module, args: object, output: Tensor) -> Tensor:
            self.embeddings.append(output.detach().requires_grad_())
            return self.embeddings[-1].clone()  # a leaf itself must not be changed in place, as some decoders do

        hook = self._embed.register_forward_hook(cut)
        try:
            yield
        finally:
            hook.remove()

    def _refusal(self, what: str) -> PadfreeError:
        inner = next((name for name, each in self._model.named_modules() if is_transformers_model(each)), "")
        return PadfreeError(
            f"{type(self._model).__name__}.forward {what}, so it can't be checked; "
            f"call padfree_patch on the transformers model inside it{inner and f', .{inner}'}"
        )


def _tensors(output: object) -> list[Tensor]:
    """Returns the tensors that a model gave, logits first: a mixture of experts may give its router's loss before."""
    if isinstance(output, dict):
        output = [output.get("logits"), *output.values()]
    return [each for each in (output if isinstance(output, (tuple, list)) else [output]) if isinstance(each, Tensor)]
