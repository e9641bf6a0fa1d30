"""The times of schedules: cron expressions where clocks change, intervals, and what is missed."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, date, datetime, timedelta, timezone
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apoq.core.cron import Cron, check_zone
from apoq.core.schedules import Timing, checked_schedule, decide, declared, offset
from apoq.errors import InvalidSchedule

QUARTER = timedelta(minutes=15)

ZONES = ["Europe/Berlin", "America/Santiago", "Australia/Lord_Howe", "Pacific/Chatham", "UTC"]

EXPRESSIONS = [
    "30 2 * * *",
    "0 0 * * *",
    "15,45 1,2,3 * * *",
    "0 * * * *",
    "*/30 2 * * *",
    "15 */6 * * *",
    "*/15 0-3 * * SUN",
    "0 2,3 1-7 * *",
]


def ticks(expression: str, zone: str, start: datetime, end: datetime) -> list[datetime]:
    cron = Cron(expression, zone)
    found = [cron.next_after(start)]
    while found[-1] <= end:
        found.append(cron.next_after(found[-1]))
    return found[:-1]


def shown(expression: str, zone: str, start: str, count: int) -> list[str]:
    """Return the first ticks after a time on the wall clock, as it shows them."""
    cron, its_zone = Cron(expression, zone), ZoneInfo(zone)
    at = datetime.fromisoformat(start).replace(tzinfo=its_zone)
    found = []
    for _ in range(count):
        at = cron.next_after(at)
        found.append(at.astimezone(its_zone).strftime("%d %H:%M %z"))
    return found


def expected(expression: str, zone: str, start: datetime, end: datetime) -> list[datetime]:
    """Return the ticks by walking through all quarters of an hour, and looking at the wall clock."""
    its_zone = ZoneInfo(zone)
    minutes, hours, days, _, weekdays = expression.split()
    is_fixed = not minutes.startswith("*") and not hours.startswith("*")

    its_minutes, its_hours, its_days = numbers(minutes, 60), numbers(hours, 24), numbers(days, 32)

    def is_wanted(wall: datetime) -> bool:
        return (
            wall.minute in its_minutes
            and wall.hour in its_hours
            and wall.day in its_days
            and (weekdays == "*" or wall.weekday() == 6)
        )

    walls = []
    at = start - timedelta(days=2)
    while at <= end:
        walls.append((at, at.astimezone(its_zone).replace(tzinfo=None, fold=0)))
        at += QUARTER
    if not is_fixed:
        found = {at for at, wall in walls if is_wanted(wall)}
    else:
        found, wanted = set(), walls[0][1]
        for at, wall in walls:
            while wanted <= wall:  # each time that the clock reaches or skips for the first time
                if is_wanted(wanted):
                    found.add(at)
                wanted += QUARTER
    return sorted(at for at in found if start < at <= end)


def numbers(field: str, most: int) -> set[int]:
    if field == "*" or field.startswith("*/"):
        return set(range(0, most, int(field[2:] or 1)))
    if "-" in field:
        first, last = map(int, field.split("-"))
        return set(range(first, last + 1))
    return set(map(int, field.split(",")))


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_year_of_ticks_is_as_on_the_wall_clock(expression, zone):
    start, end = datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)

    found = ticks(expression, zone, start, end)

    assert found == expected(expression, zone, start, end)


@given(
    st.sampled_from(EXPRESSIONS),
    st.sampled_from([*ZONES, "Antarctica/Troll", "Africa/Casablanca", "America/New_York", "Asia/Tehran"]),
    st.integers(0, 2**31 - 1),
)
def test_the_next_tick_is_the_first_one_from_wherever_one_starts(expression, zone, seconds):
    start = datetime.fromtimestamp(seconds, UTC)
    cron = Cron(expression, zone)
    tick = cron.next_after(start)

    assert tick > start
    assert cron.next_after(tick - timedelta(seconds=1)) == tick
    assert cron.next_after(start + (tick - start) / 2) == tick


@pytest.mark.parametrize(
    ("expression", "zone", "start", "found"),
    [
        # A fixed time that is skipped has its tick after the gap, and several have one.
        ("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00", ["29 03:00 +0200", "30 02:30 +0200"]),
        ("10,30 2 * * *", "Europe/Berlin", "2026-03-28T12:00", ["29 03:00 +0200", "30 02:10 +0200"]),
        ("0 2,3 * * *", "Europe/Berlin", "2026-03-28T12:00", ["29 03:00 +0200", "30 02:00 +0200"]),
        ("0 0 * * *", "America/Santiago", "2026-09-05T12:00", ["06 01:00 -0300", "07 00:00 -0300"]),
        ("15 2 * * *", "Australia/Lord_Howe", "2026-10-03T12:00", ["04 02:30 +1100", "05 02:15 +1100"]),
        ("0 3 * * *", "Pacific/Chatham", "2026-09-26T12:00", ["27 03:45 +1345", "28 03:00 +1345"]),
        # A whole day that is skipped: Samoa moved across the date line.
        ("0 12 30 * *", "Pacific/Apia", "2011-12-29T12:00", ["31 00:00 +1400", "30 12:00 +1400"]),
        # A fixed time that occurs twice has its tick the first time.
        ("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00", ["25 02:30 +0200", "26 02:30 +0100"]),
        ("45 1 * * *", "Australia/Lord_Howe", "2026-04-04T12:00", ["05 01:45 +1100", "06 01:45 +1030"]),
        # A star goes by real time.
        ("0 * * * *", "Europe/Berlin", "2026-10-25T01:00", ["25 02:00 +0200", "25 02:00 +0100"]),
        ("*/30 * * * *", "Europe/Berlin", "2026-03-29T01:00", ["29 01:30 +0100", "29 03:00 +0200"]),
        ("*/15 3 * * *", "Australia/Lord_Howe", "2026-10-03T12:00", ["04 03:00 +1100", "04 03:15 +1100"]),
        ("*/15 2 * * *", "Australia/Lord_Howe", "2026-04-04T12:00", ["05 02:00 +1030", "05 02:15 +1030"]),
        ("*/30 0 * * *", "America/Santiago", "2026-09-05T12:00", ["07 00:00 -0300", "07 00:30 -0300"]),
    ],
)
def test_clocks_that_change(expression, zone, start, found):
    assert shown(expression, zone, start, len(found)) == found


def test_a_tick_of_the_first_pass_is_not_found_again_in_the_second_one():
    second_pass = datetime(2026, 10, 25, 2, 10, fold=1, tzinfo=ZoneInfo("Europe/Berlin"))

    tick = Cron("30 2 * * *", "Europe/Berlin").next_after(second_pass)

    assert tick == datetime(2026, 10, 26, 1, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    "name", ["@hourly", "@daily", "@midnight", "@weekly", "@monthly", "@yearly", "@annually"]
)
def test_names_stand_for_expressions(name):
    tick = Cron(name.upper(), "UTC").next_after(datetime(2026, 1, 1, 12, 30, tzinfo=UTC))

    assert (tick.minute, tick.second) == (0, 0)


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("61 * * * *", r"the minute '61' of cron '61 \* \* \* \*' is not valid"),
        ("0 24 * * *", "the hour '24'"),
        ("0 0 30 2 *", "the day-of-month '30'"),
        ("0 0 1 13 *", "the month '13'"),
        ("0 0 * * MON-FRY", "the day-of-week 'MON-FRY'"),
        ("H * * * *", "the minute 'H'"),
        ("*/0 * * * *", "the minute '"),
        ("0 0 * * 5-1", "the day-of-week '5-1'"),
        ("* * * * * *", "five fields.*got 6.*every="),
        ("", "five fields.*got 0"),
        ("hello", "five fields.*got 1"),
        ("@every 5m", "one of @hourly, @daily"),
        ("@reboot", "one of @hourly, @daily"),
        (5, "cron must be text such as '0 9"),
        ("0 0 */20 2 MON#5", "a time that occurs"),
        ("0 0 * *\0 *", "is not valid"),
    ],
)
def test_an_invalid_expression_is_refused_with_its_field_and_an_example(expression, complaint):
    with pytest.raises(InvalidSchedule, match=complaint) as raised:
        checked_schedule(cron=expression)

    assert "0 9 * * MON-FRI" in str(raised.value) or "occurs" in str(raised.value)


@pytest.mark.parametrize(
    "zone", ["+02:00", "-0500", "UTC+2", "GMT-3", "Etc/GMT-2", "EST", "MST", timezone(timedelta(hours=2))]
)
def test_a_fixed_offset_is_refused(zone):
    with pytest.raises(InvalidSchedule, match=r"the name of a place.*fixed offset"):
        checked_schedule(cron="@daily", timezone=zone)


@pytest.mark.parametrize(
    "zone", ["Mars/Base", "Europe", "", "../UTC", "/etc/passwd", "a\0b", "x" * 300, 5, b"UTC"]
)
def test_an_unknown_time_zone_is_refused(zone):
    with pytest.raises(InvalidSchedule, match="timezone must be a name"):
        checked_schedule(cron="@daily", timezone=zone)


@pytest.mark.parametrize(
    ("zone", "name"), [(UTC, "UTC"), (ZoneInfo("Asia/Tokyo"), "Asia/Tokyo"), ("Etc/GMT", "Etc/GMT")]
)
def test_a_time_zone_may_be_an_object(zone, name):
    assert check_zone(zone) == name


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "must have times"),
        ({"cron": "@daily", "every": 60}, "must not both be given"),
        ({"every": 60, "timezone": "Europe/Berlin"}, "timezone must be given with cron only"),
        ({"every": 0.5}, "at least one second"),
        ({"every": timedelta(0)}, "at least one second"),
        ({"every": -1}, "every must be between"),
        ({"every": "5m"}, "every must be a number of seconds or a timedelta"),
        ({"every": float("nan")}, "every must be between"),
        (
            {"cron": "@daily", "catch_up": "last"},
            "catch_up must be one of 'latest', 'all', 'skip', got 'last'",
        ),
        ({"cron": "@daily", "overlap": "wait"}, "overlap must be one of 'skip', 'allow', got 'wait'"),
        ({"cron": "@daily", "catch_up": "all", "overlap": "skip"}, "overlap='allow'"),
        ({"cron": "@daily", "catch_up_limit": 0}, "catch_up_limit must be a whole number"),
        ({"cron": "@daily", "catch_up_limit": True}, "catch_up_limit must be a whole number"),
        ({"cron": "@daily", "catch_up_limit": 1_001}, "from 1 to 1,000"),
        ({"cron": "@daily", "not_before": datetime(2026, 1, 1, tzinfo=UTC)}, "it is an age, not a time"),
        ({"cron": "@daily", "jitter": -5}, "jitter must be between"),
    ],
)
def test_invalid_options_are_refused(options, complaint):
    with pytest.raises(InvalidSchedule, match=complaint):
        checked_schedule(**options)


def test_a_schedule_can_be_turned_off_by_a_setting():
    assert declared({}) is None
    assert declared({"cron": None, "timezone": "Europe/Berlin"}) is None

    with pytest.raises(InvalidSchedule, match="must have times"):
        declared({"timezone": "Europe/Berlin"})


@given(
    st.timedeltas(timedelta(seconds=1), timedelta(days=400)),
    st.integers(-(2**31), 2**32),
)
def test_intervals_are_multiples_since_1970(every, seconds):
    start = datetime.fromtimestamp(seconds, UTC)
    timing = Timing(None, every=every)
    first = timing.next_after(start)
    second = timing.next_after(first)

    assert start < first <= start + every
    assert second - first == every
    assert (first - datetime(1970, 1, 1, tzinfo=UTC)) % every == timedelta(0)


@pytest.mark.parametrize(
    "timing", [Timing("*/10 * * * *", "Europe/Berlin"), Timing(None, every=timedelta(minutes=10))]
)
@pytest.mark.parametrize("hours", [0, 1, 50, 500])
@pytest.mark.parametrize("at_most", [1, 7, 1_000])
def test_the_last_ticks_of_an_outage_are_found(timing, hours, at_most):
    until = datetime(2026, 10, 30, 5, 3, tzinfo=UTC)
    after = until - timedelta(hours=hours)
    all_of_them = []
    tick = timing.next_after(after)
    while tick <= until:
        all_of_them.append(tick)
        tick = timing.next_after(tick)

    assert timing.last_between(after, until, at_most) == all_of_them[-at_most:]


def due(at: str, **options: object) -> tuple[list[str], str, bool]:
    """Decide on a schedule for each quarter of an hour that was due at 10:00."""
    day = date(2026, 5, 4)
    given = {"catch_up": "latest", "catch_up_limit": 100, "not_before": None, **options}
    found = decide(
        Timing("*/15 * * * *", "UTC"),
        next_at=datetime(day.year, day.month, day.day, 10, tzinfo=UTC),
        now=datetime.fromisoformat(f"{day}T{at}+00:00"),
        **given,
    )
    return [f"{tick:%H:%M}" for tick in found.ticks], f"{found.next_at:%H:%M}", found.has_missed


@pytest.mark.parametrize(
    ("at", "options", "found"),
    [
        ("10:00:01", {}, (["10:00"], "10:15", False)),
        ("10:14:59", {}, (["10:00"], "10:15", False)),
        ("10:50:00", {}, (["10:45"], "11:00", True)),
        ("10:45:00", {}, (["10:45"], "11:00", True)),
        ("10:50:00", {"catch_up": "all"}, (["10:00", "10:15", "10:30", "10:45"], "11:00", False)),
        ("10:50:00", {"catch_up": "all", "catch_up_limit": 2}, (["10:30", "10:45"], "11:00", True)),
        (
            "10:50:00",
            {"catch_up": "all", "not_before": timedelta(minutes=25)},
            (["10:30", "10:45"], "11:00", True),
        ),
        ("10:50:00", {"catch_up": "skip"}, ([], "11:00", True)),
        ("10:45:30", {"catch_up": "skip"}, (["10:45"], "11:00", True)),
        ("10:00:59", {"catch_up": "skip"}, (["10:00"], "10:15", False)),
        ("10:50:00", {"catch_up": "skip", "not_before": timedelta(minutes=6)}, (["10:45"], "11:00", True)),
        ("10:50:00", {"not_before": timedelta(minutes=4)}, ([], "11:00", True)),
        ("10:00:00", {"catch_up": "unknown", "catch_up_limit": -5}, (["10:00"], "10:15", False)),
    ],
)
def test_what_becomes_of_ticks_that_are_over(at, options, found):
    assert due(at, **options) == found


def test_a_long_outage_is_caught_up_quickly():
    now = datetime(2036, 1, 1, 0, 0, 30, tzinfo=UTC)

    found = decide(
        Timing("* * * * *", "Europe/Berlin"),
        next_at=datetime(2026, 1, 1, tzinfo=UTC),
        now=now,
        catch_up="all",
        catch_up_limit=1_000,
        not_before=None,
    )

    assert found.ticks[-1] == now.replace(second=0)
    assert all(later - earlier == timedelta(minutes=1) for earlier, later in pairwise(found.ticks))
    assert len(found.ticks) == 1_000
    assert found.has_missed


def test_jitter_is_the_same_in_each_process():
    code = (
        "from apoq.core.schedules import offset; from datetime import timedelta; "
        "print(offset('q', 'digest-7', timedelta(hours=1)).total_seconds())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    mine = offset("q", "digest-7", timedelta(hours=1))

    assert float(run.stdout) == mine.total_seconds()
    assert timedelta(0) <= mine < timedelta(hours=1)
    assert len({offset("q", f"digest-{n}", timedelta(hours=1)) for n in range(100)}) > 90
