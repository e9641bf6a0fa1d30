"""Statements that are sent again and again rest only while they take longer than usual."""

from __future__ import annotations

import pytest

from apoq.core.pace import MAX_INTERVAL_SECONDS, Pace


@pytest.fixture
def pace() -> Pace:
    """A pace whose statements usually take a millisecond."""
    pace = Pace()
    pace.interval(0.001)
    return pace


def test_a_statement_that_takes_as_long_as_usual_is_followed_by_the_next(pace):
    assert pace.interval(0.001) == pytest.approx(0.001, rel=0.01)


def test_after_a_slower_one_it_rests_for_the_difference(pace):
    took = 0.004

    assert pace.interval(took) - took == pytest.approx(0.003, rel=0.01)


def test_no_rest_is_long(pace):
    assert pace.interval(5.0) == MAX_INTERVAL_SECONDS


def test_what_is_usual_changes_with_time(pace):
    for _ in range(5_000):
        pace.interval(0.004)

    assert pace.interval(0.004) == pytest.approx(0.004, rel=0.01)
