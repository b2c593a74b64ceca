"""Call: one call of a wrapped function of upstream, by the names of its arguments."""

from __future__ import annotations

import copy
import inspect
import itertools
import weakref
from collections.abc import Mapping
from typing import Any

from ..upstream import Arguments, Function
from .frames import outside_graphs, runs_uncompiled

_names: weakref.WeakKeyDictionary[Function, tuple[tuple[str, ...], bool]] = weakref.WeakKeyDictionary()
_signatures: weakref.WeakKeyDictionary[Function, inspect.Signature] = weakref.WeakKeyDictionary()


def signature(function: Function) -> inspect.Signature:
    """Returns the signature of a function of upstream, as it is under upstream's decorators."""
    found = _signatures.get(function)
    if found is None:
        found = _without_annotations(inspect.signature(function))
        if all(isinstance(each.default, _PLAIN) or each.default is each.empty for each in found.parameters.values()):
            _signatures[function] = found
    return found


_PLAIN = (type(None), bool, int, float, str, tuple)
"""Types of defaults that may be kept; others could keep the function that they are a default of alive."""


def _without_annotations(found: inspect.Signature) -> inspect.Signature:
    """Returns a signature that can be kept: annotations hold classes, and those the very function."""
    empty = inspect.Signature.empty
    bare = [each.replace(annotation=empty) for each in found.parameters.values()]
    return found.replace(parameters=bare, return_annotation=empty)


def takes_keyword(function: Function, name: str) -> bool:
    """Whether a function takes a keyword argument of that name, by name or among any."""
    takes = signature(function).parameters
    return name in takes or any(each.kind is each.VAR_KEYWORD for each in takes.values())


def takes_unnamed(function: Function) -> bool:
    """Whether a function takes any number of arguments by position."""
    return _positional(function)[1]


def cannot_be_bound(function: Function, args: tuple[object, ...], kwargs: Arguments) -> bool:
    """Whether a call gives an argument twice, or too many by position: Python or a decorator has an answer for that."""
    names, takes_more = _positional(function)
    return any(name in kwargs for name in names[: len(args)]) or (len(args) > len(names) and not takes_more)


def _positional(function: Function) -> tuple[tuple[str, ...], bool]:
    """Returns the names that can be passed by position, and whether more can be."""
    found = _names.get(function)
    if found is None:
        parameters = signature(function).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = tuple(each.name for each in parameters if each.kind in kinds)
        found = _names[function] = names, any(each.kind is each.VAR_POSITIONAL for each in parameters)
    return found


class Call:
    """A call that somebody has made of a wrapped function, before it goes on to the function itself.

    Made only for calls that concern a patched model: torch.compile traces all others as one graph.
    """

    __slots__ = ("_given", "_like", "_rest", "arguments", "names", "original")

    original: Function
    """The function itself, as it was before it was wrapped."""
    names: tuple[str, ...]
    """Of the arguments that can be passed by position, in order."""
    arguments: Arguments
    """All arguments by name, those of `**kwargs` among them; may be changed."""

    def __init__(self, original: Function, args: tuple[object, ...], kwargs: Arguments):
        names, _ = _positional(original)
        self.original = self._like = original
        self.arguments = {**dict(zip(names, args)), **kwargs}
        self.names, self._rest = names, args[len(names) :]  # if that is too many, the function says so
        self._given = min(len(args), len(names))  # by position

    @property
    def module(self) -> Any:
        """The first argument: of a method, the object that it was called on."""
        return self.arguments[self.names[0]]

    def takes(self, name: str) -> bool:
        return takes_keyword(self._like, name)

    def with_defaults(self) -> Arguments:
        """Returns all arguments by name, with the defaults of those that were not given."""
        parameters = signature(self._like).parameters.values()
        return {each.name: each.default for each in parameters if each.default is not each.empty} | self.arguments

    def changed(self, original: Function | None = None, **arguments: object) -> Call:
        """Returns a copy with some arguments changed, or of another function."""
        twin = copy.copy(self)
        twin.original, twin._like = original or self.original, original or self._like
        twin.arguments = {**self.arguments, **arguments}
        twin._given = 1 if original else self._given
        return twin

    def named_like(self, function: Function) -> Call:
        """Returns the same call, its arguments named by the parameters of the function that the original calls."""
        given = [self.arguments[name] for name in self.names if name in self.arguments]
        named = Call(function, (*given, *self._rest), {k: v for k, v in self.arguments.items() if k not in self.names})
        named.original = self.original
        return named

    @runs_uncompiled
    def proceed(self) -> Any:
        """Calls the function itself, with what came by position at its position: it may have other names for it."""
        given, arguments = outside_graphs(self._sent)
        return self.original(*given, *self._rest, **arguments)

    def _sent(self) -> tuple[list[object], Arguments]:
        """Returns what goes by position, and the rest by name."""
        arguments, given = dict(self.arguments), []
        parameters = signature(self._like).parameters
        for name in self.names[: self._by_position(parameters)]:
            if name not in arguments and (
                name not in parameters or parameters[name].default is inspect.Parameter.empty
            ):
                break  # it was taken out, and the function says what is missing
            given.append(arguments.pop(name) if name in arguments else parameters[name].default)
        return given, arguments

    def _by_position(self, parameters: Mapping[str, inspect.Parameter]) -> int:
        """Returns how many arguments go by position: those that came so, and those that can go in no other way."""
        if self._rest:
            return len(self.names)
        only = itertools.takewhile(lambda each: each.kind is each.POSITIONAL_ONLY, parameters.values())
        return max([1, self._given, *(n for n, each in enumerate(only, 1) if each.name in self.arguments)])
