"""The docstrings of the public API have the sections that they need, and these are true of the code."""

from __future__ import annotations

import builtins
import importlib
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import griffe
import pages
import pytest

import apoq
import apoq.dashboard
import apoq.embedded
import apoq.errors
import apoq.events
import apoq.fastapi
import apoq.flask
import apoq.flask.tasks
import apoq.migrations
import apoq.pyramid
import apoq.testing
from apoq.events import Event
from apoq.pyramid.requests import RequestTasks
from apoq.schema.models import INTERNAL, Task
from apoq.worker.settling.counters import WorkerStats

REFERENCE = (pages.DOCS / "reference.md").read_text(encoding="utf-8")

INTERNAL: dict[str, set[str]] = {
    "apoq.Queue": {"adopt", "declare", "register_in", "scheduled_tasks"},
    "apoq.TypedTask": {"concurrency_key_of", "follow_up", "scheduled_data"},
    "apoq.Worker": {"processors"},
    "apoq.RunningTask": {"from_queue", "is_async"},
    "apoq.Task": {"indexed_state", "metadata", "registry", "type_annotation_map", *INTERNAL},
    "apoq.Schedule": {"metadata", "registry", "type_annotation_map"},
    "apoq.flask.Apoq": {"current", "equip"},
    "apoq.events.Events": {"has_listeners", "emit", "report"},
    # Those of TypedTask.
    "apoq.flask.AppTask": {
        "call",
        "concurrency_key_of",
        "follow_up",
        "result",
        "scheduled_data",
        "to",
        "wait",
    },
}
"""Public names of public classes that other parts of the library use; the reference doesn't show them."""

CALLED_BY_OTHERS = {"apoq.TypedTask.__call__", "apoq.migrations.include_object"}
"""Callables whose parameters are those of the user's function, or of Alembic."""

NO_CONSTRUCTOR = {"apoq.Group", "apoq.Schedule", "apoq.Task", "apoq.TypedTask"}
"""Classes that a user's code doesn't construct, or that SQLAlchemy gives a constructor."""

DEFINED_ELSEWHERE = {
    "Misconfigured": apoq.pyramid.Misconfigured,
    "EmbeddedUnavailable": apoq.embedded.EmbeddedUnavailable,
}
"""Exceptions that are neither builtins nor in `apoq.errors`."""


def shown() -> Iterator[tuple[str, list[str] | None]]:
    """Yield the names in the reference, with the members that it lists."""
    blocks = re.split(r"^::: ", REFERENCE, flags=re.MULTILINE)[1:]
    for block in blocks:
        name = block.partition("\n")[0].strip()
        listed = re.search(r"members: *\[(.*)\]", block)
        items = re.findall(r"^        - (\w+)$", block, re.MULTILINE)
        members = listed[1].replace('"', "").split(", ") if listed and listed[1] else items
        yield name, members if "members:" in block else None


SHOWN = dict(shown())


def load(name: str) -> Any:
    """Return the object with this dotted name."""
    module, rest = name, []
    while True:
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
        else:
            break
    for part in rest:
        found = getattr(found, part)
    return found


def public_members(kind: type) -> set[str]:
    own = {name for each in kind.__mro__ if each.__module__.startswith("apoq") for name in vars(each)}
    return {name for name in own if not name.startswith("_")}


def callables() -> dict[str, Callable[..., Any]]:
    """Return the functions, methods and constructors in the reference, by name."""
    found: dict[str, Callable[..., Any]] = {}
    for name, members in SHOWN.items():
        it = load(name)
        if inspect.isfunction(it):
            found[name] = it
        if inspect.isclass(it):
            for member in members or []:
                if inspect.isfunction(getattr(it, member, None)):
                    found[f"{name}.{member}"] = getattr(it, member)
            if name not in NO_CONSTRUCTOR and (init := vars(it).get("__init__")) and init.__doc__:
                found[f"{name}()"] = init
    return found


CALLABLES = callables()


def sections(function: Callable[..., Any]) -> dict[str, Any]:
    logging.getLogger("griffe").disabled = True
    parsed = griffe.Docstring(inspect.getdoc(function) or "", lineno=1).parse(
        "google", returns_multiple_items=False, returns_named_value=False, warnings=False
    )
    return {section.kind.value: section.value for section in parsed}


every = pytest.mark.parametrize("name", CALLABLES)


@every
def test_it_has_a_first_line_of_its_own(name):
    lines = (inspect.getdoc(CALLABLES[name]) or "").splitlines()

    assert lines
    assert lines[0].endswith(".")
    assert lines[1:2] in ([], [""])


@every
def test_its_parameters_are_those_of_the_signature(name):
    function = CALLABLES[name]
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(function).parameters.values()
    expected = [stars.get(each.kind, "") + each.name for each in parameters if each.name != "self"]

    described = [each.name for each in sections(function).get("parameters", [])]

    assert described == ([] if name in CALLED_BY_OTHERS else expected)


@every
def test_its_result_is_described(name):
    function = CALLABLES[name]
    returned = inspect.unwrap(function).__annotations__["return"]
    first_line = (inspect.getdoc(function) or "").partition("\n")[0]

    is_described = bool({"returns", "yields"} & sections(function).keys())

    if returned == "None":
        assert not is_described
    elif "None" not in returned.split(" | "):
        assert is_described or "return" in first_line.lower()


@every
def test_its_exceptions_exist(name):
    function = CALLABLES[name]
    for raised in sections(function).get("raises", []):
        text = str(raised.annotation)
        found = (
            getattr(builtins, text, None) or getattr(apoq.errors, text, None) or DEFINED_ELSEWHERE.get(text)
        )
        assert isinstance(found, type), text
        assert issubclass(found, BaseException), text
        assert raised.description, text


class TestTheReference:
    @pytest.mark.parametrize("name", [name for name in SHOWN if inspect.isclass(load(name)) and SHOWN[name]])
    def test_it_lists_the_public_members_of_a_class(self, name):
        kind = load(name)
        listed = {member for member in SHOWN[name] or [] if not member.startswith("_")}
        public = public_members(kind)

        assert public - listed - described_in(kind) == public & INTERNAL.get(name, set())
        assert listed <= public

    def test_it_lists_all_events(self):
        def subclasses(kind: type) -> Iterator[str]:
            yield kind.__name__
            for each in kind.__subclasses__():
                yield from subclasses(each)

        assert set(SHOWN["apoq.events"]) == set(subclasses(Event))

    @pytest.mark.parametrize(
        "module",
        [apoq, apoq.flask, apoq.pyramid, apoq.testing],
        ids=lambda module: module.__name__,
    )
    def test_it_shows_all_that_is_public(self, module):
        names = {name.rpartition(".")[2] for name in SHOWN if name.startswith(module.__name__)}

        assert set(module.__all__) <= names

    def test_a_tasks_columns_are_shown_unless_they_are_internal(self):
        columns = {column.key for column in Task.__mapper__.column_attrs}

        assert set(SHOWN["apoq.Task"]) - {"add_outcome", "is_new"} == columns - INTERNAL["apoq.Task"]


def described_in(kind: type) -> set[str]:
    """Return the attributes that a class's docstring describes."""
    parsed = griffe.Docstring(inspect.getdoc(kind) or "", lineno=1).parse("google", warnings=False)
    return {each.name for section in parsed if section.kind.value == "attributes" for each in section.value}


@pytest.mark.parametrize("kind", [WorkerStats, RequestTasks, apoq.Queue, apoq.TypedTask])
def test_a_classes_attributes_are_described(kind):
    if kind is WorkerStats:
        names = {*WorkerStats._fields}
    else:
        names = {*re.findall(r"self\.([a-z]\w*)\b.* = ", inspect.getsource(kind.__init__))}

    assert names - {"processor"} == described_in(kind)


def test_the_attributes_of_events_are_described():
    module = griffe.load("apoq.events", search_paths=[pages.ROOT], try_relative_path=False)
    events = [each for each in module.classes.values() if each.name != "Events"]

    attributes = [each for event in events for each in event.members.values() if each.is_attribute]

    assert [each.path for each in attributes if not each.docstring] == []
    assert attributes
