"""Telling what has happened to tasks."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from apoq.events import COMPLETED, FAILED, NAMES, Event, Events, OutageBegan, TasksRescued


@pytest.fixture
def events() -> Events:
    return Events()


def test_the_events_are_these():
    assert NAMES == ("task.completed", "task.failed", "task.retried")


@pytest.mark.parametrize("name", NAMES)
def test_a_listener_gets_what_is_emitted(events, name):
    heard = []
    events.on(name, lambda *arguments: heard.append(arguments))

    events.emit(name, 1, "two")

    assert heard == [(1, "two")]


def test_a_listener_hears_its_own_event_only(events):
    heard = []
    events.on(COMPLETED, heard.append)

    events.emit(FAILED, 1)

    assert heard == []


def test_listeners_are_called_in_the_order_in_which_they_came(events):
    heard = []
    for n in range(5):
        events.on(COMPLETED, lambda _task, n=n: heard.append(n))

    events.emit(COMPLETED, None)

    assert heard == [0, 1, 2, 3, 4]


def test_a_listener_that_was_given_twice_is_called_twice(events):
    heard = []
    events.on(COMPLETED, heard.append)
    events.on(COMPLETED, heard.append)

    events.emit(COMPLETED, 1)

    assert heard == [1, 1]


def test_an_event_that_nobody_listens_to_is_no_error(events):
    events.emit(COMPLETED, 1)


def test_it_can_be_told_whether_anybody_listens(events):
    events.on(COMPLETED, print)

    assert (events.has_listeners(COMPLETED), events.has_listeners(FAILED)) == (True, False)


@pytest.mark.parametrize("name", ["completed", "task.complete", "", None, 5])
def test_an_event_that_does_not_exist_is_refused_with_the_names_of_those_that_do(events, name):
    with pytest.raises(
        ValueError,
        match=r"event must be one of task\.completed, .*, or a class of apoq\.events, got ",
    ):
        events.on(name, print)


async def coroutine_function(task) -> None:
    """What nobody would await."""


@pytest.mark.parametrize("listener", [None, "print", 5, coroutine_function])
def test_a_listener_that_could_not_be_called_is_refused(events, listener):
    with pytest.raises(TypeError, match="a listener must be a plain function, got "):
        events.on(COMPLETED, listener)

    assert not events.has_listeners(COMPLETED)


@pytest.mark.parametrize("raised", [ValueError("oops"), SystemExit(1), KeyboardInterrupt()], ids=repr)
def test_a_listener_that_raises_is_logged_and_the_others_still_hear(events, caplog, raised):
    def raising(_task):
        raise raised

    heard = []
    events.on(COMPLETED, raising)
    events.on(COMPLETED, heard.append)

    events.emit(COMPLETED, 1)

    assert heard == [1]
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage() == "a listener of task.completed raised; the task is not affected"
    assert record.exc_info[1] is raised


def test_a_listener_that_wants_other_arguments_is_logged(events, caplog):
    events.on(FAILED, lambda task: None)

    events.emit(FAILED, 1, ValueError())

    assert "a listener of task.failed raised" in caplog.text


def test_a_listener_that_is_added_by_a_listener_hears_the_next_event(events):
    heard = []
    events.on(COMPLETED, lambda _task: events.on(COMPLETED, heard.append))

    events.emit(COMPLETED, 1)
    events.emit(COMPLETED, 2)

    assert heard == [2]


class TestAClassOfEvents:
    @pytest.fixture
    def rescued(self) -> TasksRescued:
        return TasksRescued(3, None)

    def test_its_listener_gets_the_event(self, events, rescued):
        heard = []
        events.on(TasksRescued, heard.append)

        events.report(rescued)

        assert heard == [rescued]

    def test_its_listener_gets_the_events_of_the_classes_below_it(self, events, rescued):
        heard = []
        events.on(Event, heard.append)

        events.report(rescued)

        assert heard == [rescued]

    def test_the_listener_of_another_class_is_not_called(self, events, rescued):
        heard = []
        events.on(OutageBegan, heard.append)

        events.report(rescued)

        assert heard == []

    def test_a_listener_that_does_not_want_it_now_is_not_called(self, events, rescued):
        heard = []
        wants = [False, False, True, True]
        events.on(TasksRescued, heard.append, when=lambda: wants.pop(0))

        assert not events.has_listeners(TasksRescued)
        events.report(rescued)
        assert heard == []

        assert events.has_listeners(TasksRescued)
        events.report(rescued)
        assert heard == [rescued]

    def test_a_listener_that_raises_is_logged_with_the_class(self, events, rescued, caplog):
        def raising(_event):
            raise ValueError("oops")

        events.on(TasksRescued, raising)

        events.report(rescued)

        assert "a listener of TasksRescued raised" in caplog.text

    def test_another_class_is_refused(self, events):
        with pytest.raises(ValueError, match=r"got <class 'int'>"):
            events.on(int, print)

    def test_an_event_can_not_be_changed(self, rescued):
        with pytest.raises(dataclasses.FrozenInstanceError):
            rescued.count = 5
