"""Durations and times on the command line, and the user's own lines in a traceback."""

from __future__ import annotations

import time as clock
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone

import pytest
from click import BadParameter

from apoq.cli.tracebacks import highlighted
from apoq.cli.values import duration, identifier, past_time, patience, time
from apoq.monitor.tracebacks import own_frame

HOUR = timedelta(hours=1)


@pytest.fixture
def tokyo(monkeypatch) -> Iterator[timezone]:
    """This machine is in Tokyo, nine hours before UTC, all year."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    clock.tzset()
    yield timezone(9 * HOUR)
    monkeypatch.undo()
    clock.tzset()


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("90", timedelta(seconds=90)),
        ("2h", 2 * HOUR),
        ("30 min", HOUR / 2),
        ("30min", HOUR / 2),
        ("5 mins", HOUR / 12),
        ("10 sec", timedelta(seconds=10)),
        ("1h30m", 1.5 * HOUR),
        ("1 day 2 hours", 26 * HOUR),
        ("1w", timedelta(weeks=1)),
    ],
)
class TestALengthOfTime:
    def test_it_is_read(self, text, length):
        assert duration(text) == length
        assert patience(text) == length.total_seconds()

    @pytest.mark.parametrize("suffix", ["", " ago"])
    def test_it_is_how_long_ago_something_was(self, text, length, suffix):
        before = datetime.now(UTC)

        found = past_time(text + suffix)

        assert before <= found + length <= datetime.now(UTC)


class TestATime:
    @pytest.mark.parametrize("read", [time, past_time])
    def test_without_a_zone_it_is_local(self, tokyo, read):
        assert read("2031-05-04T12:00") == datetime(2031, 5, 4, 12, tzinfo=tokyo)
        assert read("2031-05-04 12:00") == datetime(2031, 5, 4, 12, tzinfo=tokyo)

    @pytest.mark.parametrize("read", [time, past_time])
    def test_a_date_is_its_midnight(self, tokyo, read):
        assert read("2031-05-04") == datetime(2031, 5, 4, tzinfo=tokyo)
        assert read("20310504") == datetime(2031, 5, 4, tzinfo=tokyo)

    @pytest.mark.parametrize("read", [time, past_time])
    def test_with_a_zone_it_is_there(self, tokyo, read):
        assert read("2031-05-04T12:00Z") == datetime(2031, 5, 4, 12, tzinfo=UTC)
        assert read("2031-05-04T12:00-05:00") == datetime(2031, 5, 4, 17, tzinfo=UTC)

    def test_days_have_names(self, tokyo):
        today = past_time("today")

        assert today.astimezone(tokyo).time() == datetime.min.time()
        assert timedelta() <= datetime.now(UTC) - today < 24 * HOUR
        assert past_time("Yesterday") == today - 24 * HOUR


@pytest.mark.parametrize("read", [duration, patience, time, past_time])
@pytest.mark.parametrize("text", ["", "soon", "1x", "-1h", "99999999999w"])
def test_anything_else_is_refused_with_examples(read, text):
    with pytest.raises(BadParameter, match=r"must be .*, got "):
        read(text)


@pytest.mark.parametrize("text", ["", "seven", "1.5", str(2**63), "9" * 5_000])
def test_an_id_is_a_whole_number(text):
    with pytest.raises(BadParameter, match="must be a task's ID, which is a whole number, got "):
        identifier(text)


OWN = '  File "/srv/shop/tasks.py", line 12, in charge\n    call(card)'
LIBRARY = (
    '  File "/srv/.venv/lib/python3.13/site-packages/requests/api.py", line 7, in call\n'
    "    raise E\n    ^^^^^^^"
)
STANDARD = '  File "/usr/lib/python3.13/socket.py", line 1, in connect'
HEADING = "Traceback (most recent call last):"


class TestATraceback:
    def test_the_innermost_own_line_is_found_below_those_of_libraries(self):
        outer = OWN.replace("12", "3")

        found = own_frame(f"{HEADING}\n{outer}\n{LIBRARY}\n{OWN}\n{LIBRARY}\n{STANDARD}\nE: no".splitlines())

        assert found == ("/srv/shop/tasks.py", "12", "charge", "call(card)")

    def test_the_last_of_several_counts(self):
        first = OWN.replace("charge", "cause")
        joined = [HEADING, first, "E: a", "", "During handling of the above …", "", HEADING, OWN, "E: b"]

        found = own_frame("\n".join(joined).splitlines())

        assert found is not None
        assert found.function == "charge"

    def test_one_without_source_has_no_code(self):
        found = own_frame([OWN.splitlines()[0], OWN.splitlines()[0]])

        assert found is not None
        assert found.code == ""

    @pytest.mark.parametrize("lines", [[], ["E: no"], [HEADING, *LIBRARY.splitlines()], ["File x, line 1"]])
    def test_there_may_be_none(self, lines):
        assert own_frame(lines) is None

    def test_libraries_are_dimmed_and_carets_left_out(self):
        text = highlighted(f"{HEADING}\n{LIBRARY}\n{OWN}\nE: no".splitlines())

        assert "^" not in text.plain
        bright = [text.plain[span.start : span.end] for span in text.spans if not span.style]
        dimmed = "".join(text.plain[span.start : span.end] for span in text.spans if span.style == "dim")
        assert "tasks.py" not in dimmed
        assert "requests" in dimmed
        assert bright == [] or "requests" not in "".join(bright)
