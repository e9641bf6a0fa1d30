"""The way by which a worker listens, where it isn't its engine's."""

from __future__ import annotations

import logging
import threading
import time
from datetime import timedelta

import probe
import pytest
import sqlalchemy as sa
from proxy import Proxy
from sqlalchemy.orm import Session

from apoq import Queue, UnsupportedDatabase, Worker
from apoq.flask import settings as flask_settings
from apoq.pyramid import settings as pyramid_settings
from apoq.worker.claiming import listener

SOON = 10.0
LONG = timedelta(hours=1)


@pytest.fixture(params=[False, True], ids=["URL", "str"])
def listen_url(request, url):
    return url.render_as_string(hide_password=False) if request.param else url


def test_notifications_arrive_by_it(engine, listen_url, make_worker):
    ran = threading.Semaphore(0)
    worker = make_worker(poll_interval=LONG, listen_url=listen_url)
    worker.use("t", lambda task: ran.release())
    worker.start()

    for _ in range(3):
        with Session(engine) as session, session.begin():
            Queue().add(session, "t")
        assert ran.acquire(timeout=SOON)


def test_nothing_but_notifications_goes_that_way(engine, url, make_worker):
    """Who may listen past a pooler need not be allowed to work there."""
    ran = threading.Event()
    worker = make_worker(poll_interval=LONG, listen_url=url)
    worker.use("t", lambda task: ran.set())
    listening = threading.Event()
    probe.after_listening(worker, listening.set)
    worker.start()
    assert listening.wait(SOON)
    pid = probe.listening_session(worker)
    with Session(engine) as session, session.begin():
        Queue().add(session, "t")
    assert ran.wait(SOON)

    last = sa.text("SELECT query FROM pg_stat_activity WHERE pid = :pid")
    with engine.connect() as connection:
        assert "LISTEN" in connection.scalar(last, {"pid": pid})


def test_where_it_goes_silent_the_worker_listens_again(engine, url, make_worker, monkeypatch):
    """Nothing tells of that but a question, for the heartbeat goes another way."""
    monkeypatch.setattr(listener, "CHECK_INTERVAL_SECONDS", 0.1)
    monkeypatch.setattr(listener, "ANSWER_TIMEOUT_SECONDS", 0.5)
    proxy = Proxy(url)
    ran = threading.Semaphore(0)
    worker = make_worker(poll_interval=LONG, listen_url=proxy.url)
    worker.use("t", lambda task: ran.release())
    listening, deadline = threading.Event(), time.monotonic() + 2 * SOON
    probe.after_listening(worker, listening.set)
    worker.start()
    assert listening.wait(SOON)
    before = probe.listening_connection(worker)

    proxy.cut()
    proxy.heal()
    while probe.listening_connection(worker) in (None, before):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for _ in range(3):
        with Session(engine) as session, session.begin():
            Queue().add(session, "t")
        assert ran.acquire(timeout=SOON)
    worker.stop()
    proxy.close()


def test_that_it_leads_elsewhere_is_said_and_tasks_are_found_by_looking(
    engine, url, make_worker, monkeypatch, caplog
):
    monkeypatch.setattr(listener, "PROBE_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr(listener, "PROBE_RETRY_SECONDS", 0.1)
    ran = threading.Event()
    worker = make_worker(poll_interval=timedelta(milliseconds=100), listen_url=url.set(database="postgres"))
    worker.use("t", lambda task: ran.set())
    with caplog.at_level(logging.DEBUG, "apoq"):
        worker.start()
        with Session(engine) as session, session.begin():
            Queue().add(session, "t")
        assert ran.wait(SOON)
        deadline = time.monotonic() + SOON
        while sum("receives no notifications" in message for message in caplog.messages) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    (warning,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert "receives no notifications" in warning.getMessage()


def test_that_notifications_arrive_is_tried_where_no_other_worker_hears_it(engine, make_worker):
    with engine.connect() as connection:
        raw = connection.connection.driver_connection
        raw.autocommit = True
        raw.execute("LISTEN apoq")
        worker = make_worker(poll_interval=LONG)
        worker.start()
        listening = (
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE datname = current_database() AND query LIKE '%LISTEN \"apoq\"'"
        )
        deadline = time.monotonic() + SOON
        while not raw.execute(listening).fetchone()[0]:
            assert time.monotonic() < deadline
        heard = list(raw.notifies(timeout=0.2))
        raw.autocommit = False

    assert heard == []


def test_stopping_while_it_is_tried_takes_no_time_and_is_no_reason_to_warn(
    url, make_worker, monkeypatch, caplog
):
    monkeypatch.setattr(listener, "PROBE_TIMEOUT_SECONDS", 60.0)
    worker = make_worker(listen_url=url.set(database="postgres"))
    worker.start()
    began = time.monotonic()
    worker.stop()

    assert time.monotonic() - began < SOON
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    "wrong", [b"postgresql://u:secret@h/d", 5, sa.create_engine("postgresql+psycopg://")]
)
def test_what_is_no_url_is_refused(engine, wrong):
    with pytest.raises(TypeError, match=f"listen_url is a URL .* not {type(wrong).__name__}$"):
        Worker(engine, listen_url=wrong)


@pytest.mark.parametrize("wrong", ["secret", "", "postgresql://u:p@ss:secret@host/d"])
def test_a_url_that_can_not_be_read_is_refused_and_not_repeated(engine, wrong):
    with pytest.raises(ValueError, match="listen_url: the database's URL can't be read") as caught:
        Worker(engine, listen_url=wrong)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_another_database_is_refused(engine):
    with pytest.raises(UnsupportedDatabase, match="postgresql://") as caught:
        Worker(engine, listen_url="mysql://u:secret@h/d")
    assert "secret" not in str(caught.value)


def test_its_password_is_in_no_repr(engine):
    url = "postgresql://u:secret@h/d"
    worker = Worker(engine, listen_url=url)

    for shown in (
        worker,
        worker.options,
        flask_settings.Settings.read({"APOQ_LISTEN_URL": url}),
        pyramid_settings.Settings.read({"apoq.listen_url": url}),
    ):
        assert "secret" not in repr(shown)
