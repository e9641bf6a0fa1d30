"""What becomes of a task after an attempt: a table, without a database."""

from __future__ import annotations

import asyncio
import math
import time
from datetime import timedelta
from decimal import Decimal

import pytest

from apoq import Cancel, Fail, Retry, Snooze, exponential_backoff
from apoq.core.outcomes import (
    MAX_INTEGER,
    MAX_MESSAGE_LENGTH,
    MAX_TRACEBACK_LENGTH,
    Outcome,
    Release,
    Settlement,
    Unreachable,
    WorkerDied,
    report,
    settle,
)
from apoq.core.payload import encode
from apoq.core.retry import LONGEST_DELAY, RetryPolicy, seconds
from apoq.core.states import COMPLETED, FINAL, PENDING, RUNNING, STATES, TRANSITIONS, WAITING
from apoq.errors import InvalidProcessor

POLICY = RetryPolicy(2, lambda fail_count: 10 * fail_count)
BOUND = 100
"""Characters that may stand beside those of the limits, for what says how much was left out."""


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """Raise and catch, so that it has a traceback."""
    try:
        raise error from cause
    except BaseException as caught:
        return caught


OUTCOMES = {
    # outcome, attempt, fail_count -> state, attempt, fail_count, delay, class of the error
    "first failure": (ValueError(), 1, 0, "pending", 1, 1, 10.0, "ValueError"),
    "second failure": (ValueError(), 2, 1, "pending", 2, 2, 20.0, "ValueError"),
    "last failure": (ValueError(), 3, 2, "failed", 3, 3, None, "ValueError"),
    "attempts ahead of failures": (ValueError(), 3, 0, "failed", 3, 1, None, "ValueError"),
    "failures ahead of attempts": (ValueError(), 1, 2, "failed", 1, 3, None, "ValueError"),
    "failures ahead, some left": (ValueError(), 1, 1, "pending", 1, 2, 20.0, "ValueError"),
    "attempts ahead, some left": (ValueError(), 2, 0, "pending", 2, 1, 10.0, "ValueError"),
    "SystemExit": (SystemExit(1), 1, 0, "pending", 1, 1, 10.0, "SystemExit"),
    "KeyboardInterrupt": (KeyboardInterrupt(), 1, 0, "pending", 1, 1, 10.0, "KeyboardInterrupt"),
    "CancelledError": (asyncio.CancelledError(), 3, 2, "failed", 3, 3, None, "CancelledError"),
    "bare Outcome": (Outcome(), 1, 0, "pending", 1, 1, 10.0, "Outcome"),
    "Retry": (Retry(), 1, 0, "pending", 1, 1, 10.0, "Retry"),
    "Retry with a delay": (Retry(delay=60), 1, 0, "pending", 1, 1, 60.0, "Retry"),
    "Retry at once": (Retry(delay=0), 1, 0, "pending", 1, 1, 0.0, "Retry"),
    "Retry with a timedelta": (Retry(delay=timedelta(minutes=2)), 1, 0, "pending", 1, 1, 120.0, "Retry"),
    "Retry from an error": (raised(Retry(), OSError()), 1, 0, "pending", 1, 1, 10.0, "OSError"),
    "Retry with none left": (Retry(delay=60), 3, 2, "failed", 3, 3, None, "Retry"),
    "Retry from, with none left": (raised(Retry(), OSError()), 3, 2, "failed", 3, 3, None, "OSError"),
    "Fail": (Fail("why"), 1, 0, "failed", 1, 1, None, "Fail"),
    "Fail from an error": (raised(Fail(), OSError()), 1, 0, "failed", 1, 1, None, "OSError"),
    "Cancel": (Cancel("why"), 1, 0, "cancelled", 1, 0, None, "Cancel"),
    "Cancel on the last attempt": (Cancel(), 3, 2, "cancelled", 3, 2, None, "Cancel"),
    "Snooze": (Snooze(30), 1, 0, "pending", 0, 0, 30.0, None),
    "Snooze on the last attempt": (Snooze(timedelta(hours=1)), 3, 2, "pending", 2, 2, 3600.0, None),
    "Unreachable": (Unreachable(chance=0.5), 1, 0, "pending", 0, 0, 1.5, None),
    "Unreachable on the last attempt": (Unreachable(chance=0.0), 3, 2, "pending", 2, 2, 1.0, None),
    "the most failures": (ValueError(), 1, MAX_INTEGER, "failed", 1, MAX_INTEGER, None, "ValueError"),
    "Release": (Release(), 1, 0, "pending", 0, 0, None, None),
    "Release on the last attempt": (Release(), 3, 2, "pending", 2, 2, None, None),
}


def settled(outcome, attempt, fail_count) -> Settlement:
    return settle(outcome, attempt=attempt, fail_count=fail_count, policy=POLICY)


@pytest.mark.parametrize(
    ("outcome", "attempt", "fail_count", "state", "attempt_then", "fail_count_then", "delay", "error"),
    OUTCOMES.values(),
    ids=OUTCOMES,
)
def test_the_decision(outcome, attempt, fail_count, state, attempt_then, fail_count_then, delay, error):
    settlement = settled(outcome, attempt, fail_count)

    assert (settlement.state, settlement.attempt, settlement.fail_count, settlement.delay) == (
        state,
        attempt_then,
        fail_count_then,
        delay,
    )
    assert (settlement.error and settlement.error["class"]) == error


def test_the_decisions_are_the_moves_that_a_running_task_may_make():
    assert {settled(*row[:3]).state for row in OUTCOMES.values()} | {COMPLETED} == TRANSITIONS[RUNNING]


def test_a_task_rescued_with_no_attempt_left_has_failed():
    assert settled(WorkerDied(), 4, 3).state == "failed"


def test_no_retries_means_that_the_first_failure_is_final():
    settlement = settle(ValueError(), attempt=1, fail_count=0, policy=RetryPolicy(0))

    assert settlement.state == "failed"


def test_the_reason_of_a_cancellation_is_kept():
    assert settled(Cancel("the order is gone"), 1, 0).error["message"] == "the order is gone"


class TestStates:
    def test_each_leads_to_states_only(self):
        assert set(TRANSITIONS) == set(STATES)
        assert all(exits <= set(STATES) for exits in TRANSITIONS.values())

    def test_each_is_reached_from_pending(self):
        reached, fresh = set(), {PENDING}
        while fresh:
            reached |= fresh
            fresh = {exit_ for state in fresh for exit_ in TRANSITIONS[state]} - reached

        assert reached == set(STATES)

    def test_the_final_ones_are_left_to_be_tried_again_only(self):
        assert FINAL == ("completed", "failed", "cancelled")
        assert all(TRANSITIONS[state] == {PENDING, WAITING} for state in FINAL)


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Exiting(Exception):
    def __str__(self) -> str:
        raise SystemExit


class Numeric(Exception):
    def __str__(self) -> str:
        return 5  # noqa: PLE0307


def deep_error() -> BaseException:
    def even(n: int) -> None:
        odd(n)

    def odd(n: int) -> None:
        even(n + 1)

    try:
        even(0)
    except RecursionError as error:
        return error
    raise AssertionError


def long_chain() -> BaseException:
    error: BaseException | None = None
    for n in range(1_000):
        error = raised(ValueError(n), error)
    return error


def nested_groups() -> BaseException:
    error: Exception = ValueError(1)
    for _ in range(1_000):
        error = ExceptionGroup("group", [error])
    return error


HARD = {
    "NUL": lambda: ValueError("a\0b"),
    "lone surrogate": lambda: ValueError("a\udc80b"),
    "50 MB": lambda: ValueError("x" * 50_000_000),
    "50 MB of what can't be stored": lambda: ValueError("\0\udc80" * 25_000_000),
    "50 MB in a note": lambda: noted("x" * 50_000_000),
    "no text": Mute,
    "exits": Exiting,
    "text that is a number": Numeric,
    "long name": type("E" * 100_000, (Exception,), {}),
    "huge traceback": deep_error,
    "long chain": long_chain,
    "wide group": lambda: ExceptionGroup("group", [ValueError(n) for n in range(10_000)]),
    "deep group": nested_groups,
}


def noted(note: str) -> BaseException:
    error = ValueError("noted")
    error.add_note(note)
    return error


class TestReport:
    def test_it_is_the_class_the_message_and_the_traceback(self):
        found = report(raised(ValueError("no such colour")))

        assert found["class"] == "ValueError"
        assert found["message"] == "no such colour"
        assert found["traceback"].startswith("Traceback (most recent call last):\n")
        assert found["traceback"].endswith("\nValueError: no such colour\n")

    @pytest.mark.parametrize("make", HARD.values(), ids=HARD)
    def test_it_is_bounded_text_that_jsonb_holds_and_quick_to_make(self, make):
        error = raised(make())
        began = time.monotonic()

        found = report(error)

        assert time.monotonic() - began < 5
        assert list(found) == ["class", "message", "traceback"]
        assert len(found["class"]) < MAX_MESSAGE_LENGTH + BOUND
        assert len(found["message"]) < MAX_MESSAGE_LENGTH + BOUND
        assert len(found["traceback"]) < MAX_TRACEBACK_LENGTH + BOUND
        encode(found)

    def test_what_cannot_be_stored_is_replaced_and_the_rest_is_kept(self):
        assert report(ValueError("a\0b\udc80c"))["message"] == "a\N{REPLACEMENT CHARACTER}b?c"

    def test_of_what_is_long_the_head_and_the_tail_are_kept(self):
        found = report(raised(ValueError("head" + "x" * 1_000_000 + "tail")))

        assert found["message"].startswith("headx")
        assert "\n… 996008 characters left out …\n" in found["message"]
        assert found["message"].endswith("xtail")
        assert found["traceback"].startswith("Traceback (most recent call last):")

    @pytest.mark.parametrize("error", [Mute, Exiting, Numeric])
    def test_a_message_that_cannot_be_made_says_so(self, error):
        found = report(raised(error()))

        assert (found["class"], found["message"]) == (
            error.__name__,
            "(the message is not available: str() of the error raised)",
        )
        assert "Traceback" in found["traceback"]

    def test_the_cause_of_an_error_is_in_its_traceback(self):
        found = report(raised(ValueError("outer"), OSError("inner")))

        assert found["message"] == "outer"
        assert "OSError: inner" in found["traceback"]
        assert "direct cause" in found["traceback"]

    def test_the_members_of_a_group_are_in_its_traceback(self):
        found = report(ExceptionGroup("two", [ValueError("one"), OSError("other")]))

        assert found["message"] == "two (2 sub-exceptions)"
        assert "ValueError: one" in found["traceback"]
        assert "OSError: other" in found["traceback"]

    def test_of_a_retry_from_an_error_the_error_is_kept(self):
        found = report(raised(Retry(delay=60), OSError("down")))

        assert (found["class"], found["message"]) == ("OSError", "down")

    def test_of_a_retry_by_itself_the_reason_is_kept(self):
        assert report(Retry("not yet"))["message"] == "not yet"


NOT_DELAYS = {
    "negative": -1,
    "negative timedelta": timedelta(seconds=-1),
    "NaN": math.nan,
    "infinite": math.inf,
    "None": None,
    "text": "30",
    "bool": True,
    "Decimal": Decimal(1),
    "longer than a century": LONGEST_DELAY + timedelta(seconds=1),
    "absurd": 10**5000,
}


class TestDelays:
    @pytest.mark.parametrize(
        ("delay", "in_seconds"),
        [
            (0, 0.0),
            (1, 1.0),
            (1.5, 1.5),
            (timedelta(milliseconds=1), 0.001),
            (LONGEST_DELAY, LONGEST_DELAY.total_seconds()),
        ],
    )
    def test_seconds_and_timedeltas_are_delays(self, delay, in_seconds):
        assert seconds(delay) == in_seconds

    @pytest.mark.parametrize("delay", NOT_DELAYS.values(), ids=NOT_DELAYS)
    def test_nothing_else_is(self, delay):
        with pytest.raises((TypeError, ValueError)):
            seconds(delay)

    @pytest.mark.parametrize("delay", NOT_DELAYS.values(), ids=NOT_DELAYS)
    def test_an_outcome_is_not_made_with_one(self, delay):
        if delay is not None:
            with pytest.raises((TypeError, ValueError)):
                Retry(delay=delay)
        with pytest.raises((TypeError, ValueError)):
            Snooze(delay)


class TestRetryPolicy:
    @pytest.mark.parametrize(("answer", "delay"), [(30, 30.0), (0.5, 0.5), (timedelta(minutes=1), 60.0)])
    def test_the_function_chooses_the_delay(self, answer, delay):
        assert RetryPolicy(delay=lambda _fail_count: answer).delay_after(1) == delay

    def test_the_function_gets_the_number_of_failures(self):
        assert RetryPolicy(delay=lambda fail_count: fail_count * 2).delay_after(3) == 6.0

    @pytest.mark.parametrize("answer", NOT_DELAYS.values(), ids=NOT_DELAYS)
    def test_nonsense_is_logged_and_the_default_used(self, caplog, answer):
        delay = RetryPolicy(delay=lambda _fail_count: answer).delay_after(1)

        assert delay in {1.0, 2.0}
        (record,) = caplog.records
        assert "failed for fail_count=1; using the default delay" in record.getMessage()
        assert record.exc_info[0] in {TypeError, ValueError}

    @pytest.mark.parametrize("error", [KeyError("x"), SystemExit(1)], ids=repr)
    def test_a_function_that_raises_is_logged_and_the_default_used(self, caplog, error):
        def retry_delay(_fail_count):
            raise error

        delay = RetryPolicy(delay=retry_delay).delay_after(1)

        assert delay in {1.0, 2.0}
        assert caplog.records[0].exc_info[1] is error

    def test_the_original_s_defaults(self):
        assert (RetryPolicy().limit, RetryPolicy().delay) == (5, exponential_backoff)

    @pytest.mark.parametrize("limit", [-1, 1.5, "5", None, True, math.inf], ids=repr)
    def test_a_limit_that_is_no_number_of_retries_is_refused(self, limit):
        with pytest.raises(
            InvalidProcessor, match=r"retry_limit must be a number of retries, 0 or more, got "
        ):
            RetryPolicy(limit=limit)

    @pytest.mark.parametrize(
        "delay",
        [-1, None, "30", asyncio.sleep],
        ids=lambda value: getattr(value, "__name__", repr(value)),
    )
    def test_a_delay_that_is_neither_a_duration_nor_a_plain_function_is_rejected(self, delay):
        with pytest.raises(InvalidProcessor, match=r"^retry_delay must be "):
            RetryPolicy(delay=delay)

    @pytest.mark.parametrize("delay", [30, 30.0, timedelta(seconds=30)], ids=repr)
    def test_a_delay_may_be_the_same_for_all_failures(self, delay):
        policy = RetryPolicy(delay=delay)

        assert [policy.delay_after(fail_count) for fail_count in (1, 2, 50)] == [30.0, 30.0, 30.0]


class TestExponentialBackoff:
    @pytest.mark.parametrize(
        ("fail_count", "chance", "delay"),
        [(0, 0.999999, 1), (1, 0.0, 1), (1, 0.5, 2), (3, 0.1, 1), (3, 0.5, 5), (5, 0.75, 25), (11, 0.25, 33)],
    )
    def test_it_is_the_original_s_formula(self, fail_count, chance, delay):
        assert exponential_backoff(fail_count, chance) == delay

    @pytest.mark.parametrize(
        ("fail_count", "longest"), [(1, 2), (2, 4), (6, 64), (7, 128), (8, 128), (10**9, 128)]
    )
    def test_it_grows_up_to_128_seconds(self, fail_count, longest):
        drawn = {exponential_backoff(fail_count) for _ in range(200)}

        assert min(drawn) >= 1
        assert max(drawn) <= longest
        assert exponential_backoff(fail_count, 0.999999) == longest

    def test_chance_is_drawn_where_it_is_not_given(self):
        assert len({exponential_backoff(7) for _ in range(200)}) > 1
