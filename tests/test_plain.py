"""Values of other libraries' classes, such as numpy's, pandas' and pendulum's: as options and in tests."""

from __future__ import annotations

import numbers
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from apoq import InvalidData, InvalidTask
from apoq.core.plain import plain_number
from apoq.testing import assert_enqueued


def subclass(base: Any) -> Any:
    """Make a class such as pendulum's DateTime."""
    return type(f"My{base.__name__}", (base,), {})


@numbers.Integral.register
class Whole:
    """As numpy's int64, which is no int."""

    def __index__(self) -> int:
        return 7

    def __eq__(self, other: object) -> bool:
        return other == 7

    __hash__ = None  # type: ignore[assignment]


@numbers.Real.register
class Floating:
    """As numpy's float32, which is no float."""

    def __float__(self) -> float:
        return 0.5


@numbers.Integral.register
class Span:
    """As numpy's timedelta64, which says that it is a whole number."""

    def __index__(self) -> int:
        raise TypeError

    def __float__(self) -> float:
        return 1e9


class NotATime(datetime):
    """As pandas' NaT."""

    def utcoffset(self) -> timedelta | None:
        raise ValueError("NotATime does not support utcoffset")


Bool = type("bool", (), {})

AT = subclass(datetime)(2031, 5, 4, tzinfo=UTC)
BY = subclass(timedelta)(minutes=1)


@pytest.mark.parametrize(
    ("value", "number"),
    [(7, 7), (0.5, 0.5), (Whole(), 7), (Floating(), 0.5), (subclass(int)(7), 7), (subclass(float)(1), 1.0)],
)
def test_a_number_of_any_class_is_pythons(value, number):
    assert (plain_number(value), type(plain_number(value))) == (number, type(number))


@pytest.mark.parametrize("value", [True, None, "7", Span(), Decimal(7), Fraction(1, 3), 1j, BY])
def test_what_is_no_number_that_a_float_can_hold(value):
    assert plain_number(value) is None


@pytest.mark.parametrize(
    ("options", "stored"),
    [
        ({"priority": Whole()}, {"priority": 7}),
        ({"retry_limit": Whole()}, {"retry_limit": 7}),
        ({"retry_delay": Floating()}, {"retry_delay": timedelta(seconds=0.5)}),
        ({"retry_delay": BY}, {"retry_delay": timedelta(minutes=1)}),
        ({"timeout": Whole()}, {"timeout": timedelta(seconds=7)}),
        ({"timeout": BY}, {"timeout": timedelta(minutes=1)}),
        ({"process_at": AT}, {"process_at": datetime(2031, 5, 4, tzinfo=UTC)}),
    ],
    ids=lambda value: repr(list(value)),
)
def test_it_may_be_an_option(session, queue, options, stored):
    task = queue.add(session, "t", **options)
    assert queue.add_many(session, "t", [None] * 1_500, **options) == 1_500

    session.expire(task)
    assert {name: getattr(task, name) for name in stored} == stored


def test_a_delay_may_be_of_a_subclass(session, queue):
    task = queue.add(session, "t", delay=BY)

    assert timedelta(minutes=1) <= task.process_at - task.created_at < timedelta(minutes=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process_at": NotATime(2031, 5, 4)}, "process_at must have a time zone"),
        ({"timeout": Span()}, "timeout must be a number of seconds or a timedelta, got <"),
        (
            {"retry_delay": Decimal(7)},
            "retry_delay must be a number of seconds or a timedelta, got Decimal",
        ),
    ],
    ids=["NaT", "timedelta64", "Decimal"],
)
def test_what_is_refused(session, queue, options, message):
    with pytest.raises(InvalidTask, match=message):
        queue.add(session, "t", **options)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Whole(), "Whole is not JSON, so make it a plain number: <"),
        (Bool(), r"test_plain\.bool is not JSON, so make it text, numbers, lists or dicts"),
        (AT, "Mydatetime is not JSON, so make it text"),
    ],
    ids=["number", "bool", "time"],
)
def test_plain_data_is_json(session, queue, value, message):
    with pytest.raises(InvalidData, match=message):
        queue.add(session, "t", {"a": value})


@pytest.mark.parametrize(
    "argument",
    [{"at": AT}, {"on": subclass(date)(2031, 5, 4)}, {"by": BY}, {"n": Whole()}],
    ids=lambda argument: next(iter(argument)),
)
def test_a_task_is_found_by_it(session, queue, argument):
    @queue.task(type="send")
    def send(
        at: datetime | None = None, on: date | None = None, by: timedelta | None = None, n: int = 0
    ) -> None: ...

    added = send.add(session, **argument)

    assert assert_enqueued(session, send, **argument) is added
    assert assert_enqueued(session, "send", **argument) is added
    assert assert_enqueued(session, "send", argument) is added
