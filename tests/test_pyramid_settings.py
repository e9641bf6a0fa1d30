"""What an ini file may say to `apoq.pyramid`, and what it is told where it may not."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from pyramid.config import Configurator

from apoq import Keep, Queue
from apoq.pyramid import Misconfigured
from apoq.pyramid.settings import READERS, Settings


def read(**settings) -> Settings:
    return Settings.read({f"apoq.{name}": value for name, value in settings.items()})


def test_none_are_needed():
    settings = Settings.read({"sqlalchemy.url": "…", "pyramid.includes": "apoq.pyramid"})

    assert (settings, settings.make_queue()) == (Settings(), Queue())


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("concurrency", " 8 ", 8),
        ("poll_interval", "500 s", timedelta(seconds=500)),
        ("poll_interval", "0.5", timedelta(seconds=0.5)),
        ("lease", "1 minute", timedelta(minutes=1)),
        ("keep_completed", "12h", timedelta(hours=12)),
        ("keep_completed", "0", timedelta()),
        ("keep_failed", "7 days", timedelta(days=7)),
        ("keep_failed", "2 weeks", timedelta(days=14)),
        ("keep_failed", "forever", None),
        ("keep_failed", timedelta(days=3), timedelta(days=3)),
        ("keep_failed", "7 days, at most 100,000", Keep(timedelta(days=7), 100_000)),
        ("keep_failed", "7 days, at most 100 000", Keep(timedelta(days=7), 100_000)),
        ("keep_failed", "forever, at most 5", Keep(None, 5)),
        ("listen_url", "postgres://user:secret@host/db", "postgresql+psycopg://user:secret@host/db"),
    ],
)
def test_the_workers(name, text, value):
    assert read(**{name: text}).worker == {name: value}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("session", "db", "db"),
        ("queue", "emails", "emails"),
        ("queues", "emails reports", ("emails", "reports")),
        ("queues", "\nemails\nreports", ("emails", "reports")),
        ("queues", "emails,reports, mails", ("emails", "reports", "mails")),
        ("schema", "jobs", "jobs"),
        ("base_url", "https://example.com/shop/", "https://example.com/shop"),
        ("in_process_worker", "true", True),
        ("in_process_worker", "off", False),
        ("in_process_worker", True, True),
    ],
)
def test_the_others(name, text, value):
    assert getattr(read(**{name: text}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("concurrency", "many", "must be a number of tasks, 1 or more, got 'many'"),
        ("concurrency", "0", "1 or more, got '0'"),
        ("concurrency", True, "1 or more, got True"),
        ("poll_interval", "soon", "must be a duration, such as 30 s, 10 minutes, 12 h or 7 days, got 'soon'"),
        ("poll_interval", "5 fortnights", "must be a duration"),
        ("poll_interval", "0 s", "must be positive, got '0 s'"),
        ("lease", "-1", "must be a duration"),
        ("lease", "9" * 30 + " days", "must be a duration"),
        ("keep_failed", "", "must be a duration"),
        ("keep_failed", timedelta(-1), "must not be negative"),
        ("keep_failed", "7 days, at most many", "must have a number of tasks from 1 to 10,000,000, such as "),
        ("keep_failed", "7 days, at most 0", "must have a number of tasks from 1 to 10,000,000, such as "),
        ("in_process_worker", "perhaps", "must be true or false, got 'perhaps'"),
        ("session", "request.dbsession", "must be the name of a request's attribute, such as dbsession"),
        ("session", "", "must be the name of a request's attribute"),
        ("queue", "", "must not be empty: remove it"),
        ("queue", "a\0b", "a queue's name"),
        ("queues", "", "must not be empty: remove it"),
        ("queues", " , ", "must not be empty: remove it"),
        ("queues", "x" * 1000, "a queue's name"),
        ("schema", "x" * 64, "a schema's name must have at most 63 bytes"),
        ("base_url", "example.com", "must be the start of your site's URLs, such as https://example.com"),
        ("base_url", "//[", "must be the start of your site's URLs"),
        ("listen_url", "postgresql://user:secret@host:port/db", "the database's URL can't be read"),
        ("listen_url", "mysql://user:secret@host/db", "a URL that starts with postgresql://"),
        ("listen_url", "user:secret@host", "the database's URL can't be read"),
        ("concurency", "8", "is not a setting of apoq: did you mean apoq.concurrency?"),
        (
            "sqlalchemy.url",
            "postgresql://",
            "is not a setting of apoq: it must be one of apoq.session, apoq.queue",
        ),
    ],
)
def test_one_that_makes_no_sense(name, value, says):
    with pytest.raises(Misconfigured) as raised:
        read(**{name: value})

    assert str(raised.value).startswith(f"apoq.{name}")
    assert says in str(raised.value)
    assert "secret" not in str(raised.value)


def test_it_is_said_when_the_application_is_made():
    config = Configurator(settings={"apoq.concurrency": "many"})

    with pytest.raises(Misconfigured, match=r"apoq\.concurrency must be a number of tasks"):
        config.include("apoq.pyramid")


def test_all_of_them_are_documented():
    page = (Path(__file__).parent.parent / "docs" / "pyramid.md").read_text(encoding="utf-8")

    assert [name for name in READERS if f"`apoq.{name}`" not in page] == []
