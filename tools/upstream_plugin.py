"""A pytest plugin for other people's tests: what came of each, and `apply` on every model that they build.

pytest -p upstream_plugin --outcomes FILE.json [--apply] ...

Every test begins with the same seeds, so that two runs of one test differ only by what --apply changes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from padfree_patch import PadfreeError, apply
from padfree_patch.registry import registry

WORST_FIRST = ("failed", "skipped", "passed")


@dataclasses.dataclass
class Outcome:
    """What came of a test, over its setup, call, subtests and teardown."""

    outcome: str = "passed"
    """The worst of all: failed, skipped or passed."""
    error: str = ""
    applied: int = 0
    """How many models `apply` took."""
    refused: list[str] = dataclasses.field(default_factory=list)
    """Why `apply` refused others of a supported type."""

    def add(self, outcome: str, error: str) -> None:
        if WORST_FIRST.index(outcome) < WORST_FIRST.index(self.outcome):
            self.outcome, self.error = outcome, error


class Recorder:
    """Collects what came of each test, from all processes of pytest-xdist, and writes it when the run ends."""

    def __init__(self, path: Path):
        self.path = path
        self.outcomes: dict[str, Outcome] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = self.outcomes.setdefault(report.nodeid, Outcome())
        found.add(report.outcome, last_line(report.longreprtext) if report.failed else "")
        if report.when == "teardown":  # the last report of a test has the totals
            models = dict(report.user_properties).get("padfree models", {"applied": 0, "refused": []})
            found.applied, found.refused = models["applied"], models["refused"]

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps({name: dataclasses.asdict(each) for name, each in self.outcomes.items()}))


def last_line(text: str) -> str:
    r"""Returns the error of a traceback as pytest prints it: its first line that begins with E.

    >>> last_line("def test():\nE   assert 1 == 2\nE    +  where")
    'assert 1 == 2'
    """
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("E").strip() for line in lines if line.startswith("E  ")]
    return (errors or lines or [""])[0][:300]


class Applying:
    """Calls `apply` on each model that is built, when the outermost call that builds it has returned."""

    def __init__(self) -> None:
        self.depth = 0
        self.forget()

    def forget(self) -> None:
        """Starts counting anew, for the next test."""
        self.applied = 0
        self.refused: list[str] = []

    @contextmanager
    def building(self) -> Iterator[Callable[[Any], None]]:
        """Yields a function that applies to what was built, and does nothing inside another `building`."""
        self.depth += 1
        try:
            yield self.take if self.depth == 1 else lambda built: None
        finally:
            self.depth -= 1

    def take(self, built: Any) -> None:
        model = built[0] if isinstance(built, tuple) else built  # from_pretrained(output_loading_info=True)
        if registry().get(getattr(model.config, "model_type", None)) is None:
            return
        try:
            apply(model, verify=False)
            self.applied += 1
        except PadfreeError as error:
            self.refused.append(f"{type(model).__name__}: {str(error).splitlines()[0]}")

    def install(self) -> None:
        """Wraps whatever builds a model, for classes that exist and those that are still to be defined."""
        for name in ("from_pretrained", "_from_config"):
            setattr(PreTrainedModel, name, self.wrap_factory(vars(PreTrainedModel)[name].__func__))
        self.wrap_later_classes()
        for cls in subclasses(PreTrainedModel):
            self.wrap_init(cls)

    def wrap_factory(self, factory: Callable[..., Any]) -> Any:
        @functools.wraps(factory)
        def wrapped(cls: Any, *args: Any, **kwargs: Any) -> Any:
            with self.building() as take:
                built = factory(cls, *args, **kwargs)
                take(built)
            return built

        return classmethod(wrapped)

    def wrap_later_classes(self) -> None:
        upstreams = vars(PreTrainedModel).get("__init_subclass__")  # a classmethod, where there is one

        def hook(cls: Any, **kwargs: Any) -> None:
            if upstreams is None:
                super(PreTrainedModel, cls).__init_subclass__(**kwargs)
            else:
                upstreams.__get__(None, cls)(**kwargs)
            self.wrap_init(cls)

        PreTrainedModel.__init_subclass__ = classmethod(hook)  # type: ignore[assignment]

    def wrap_init(self, cls: Any) -> None:
        """Gives a class an `__init__` of its own, since that of a class without one is never the outermost."""
        init = cls.__init__

        @functools.wraps(init)
        def wrapped(model: Any, *args: Any, **kwargs: Any) -> None:
            with self.building() as take:
                init(model, *args, **kwargs)
                take(model)

        cls.__init__ = wrapped


def subclasses(cls: type) -> list[type]:
    """Returns all classes below one, those of a base before its own."""
    return [found for each in cls.__subclasses__() for found in (each, *subclasses(each))]


applying = Applying()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("padfree_patch")
    group.addoption("--outcomes", type=Path, help="where to write what came of each test, as JSON")
    group.addoption("--apply", action="store_true", help="call padfree_patch.apply on every model that is built")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("apply"):
        applying.install()
    if config.getoption("outcomes") and not hasattr(config, "workerinput"):  # workers of xdist report to the first
        config.pluginmanager.register(Recorder(config.getoption("outcomes")))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    applying.forget()
    random.seed(0)
    torch.manual_seed(0)
    if common := sys.modules.get("tests.test_modeling_common"):  # upstream's helpers draw from a generator of their own
        common.global_rng.seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    if call.when == "teardown":
        item.user_properties.append(
            ("padfree models", {"applied": applying.applied, "refused": list(applying.refused)})
        )
