"""apoq in Pyramid applications."""

from __future__ import annotations

import pyramid_site
import pytest
import sqlalchemy as sa
from pyramid_site import Base, Note
from sqlalchemy.orm import Session
from webtest import TestApp

from apoq import Task, Worker
from apoq.pyramid import make_worker


@pytest.fixture
def settings(engine):
    Base.metadata.create_all(engine)
    return {"sqlalchemy.url": engine.url.render_as_string(hide_password=False)}


@pytest.fixture
def make_site(settings):
    """Make applications, whose engines are disposed of at the end."""
    made = []

    def make(**more):
        made.append(pyramid_site.main({}, **settings, **more))
        return made[-1]

    yield make
    for site in made:
        site.registry["dbsession_factory"].kw["bind"].dispose()


@pytest.fixture
def site(make_site):
    return make_site()


@pytest.fixture
def browser(site):
    return TestApp(site)


@pytest.fixture
def worker(site) -> Worker:
    return make_worker(site.registry)


@pytest.fixture
def tasks(engine):
    def read() -> list[tuple[str, str]]:
        with Session(engine) as session:
            return [tuple(row) for row in session.execute(sa.select(Task.type, Task.state).order_by(Task.id))]

    return read


@pytest.fixture
def notes(engine):
    def read() -> list[str]:
        with Session(engine) as session:
            return list(session.scalars(sa.select(Note.text).order_by(Note.id)))

    return read


class TestAdding:
    def test_the_task_of_an_otherwise_read_only_request_is_committed(self, browser, tasks):
        browser.get("/add")

        assert tasks() == [("note", "pending")]

    def test_many_are_too(self, browser, tasks):
        assert browser.get("/add_many").text == "1500"

        assert len(tasks()) == 1_500

    def test_a_request_that_raises_leaves_none(self, browser, tasks):
        with pytest.raises(ValueError, match="after it was added"):
            browser.get("/add_and_raise")

        assert tasks() == []

    def test_a_request_that_is_refused_leaves_none(self, browser, tasks):
        browser.get("/add_and_refuse", status=400)

        assert tasks() == []

    def test_a_request_that_is_tried_again_leaves_one(self, browser, tasks):
        browser.get("/add_on_the_third_attempt")

        assert tasks() == [("note", "pending")]


class TestProcessing:
    def test_what_its_session_writes_commits(self, browser, worker, tasks, notes):
        browser.get("/add", {"text": "hello"})

        assert worker.work() is not None

        assert (tasks(), notes()) == ([("note", "completed")], ["hello"])

    def test_where_it_raises_nothing_does(self, browser, worker, tasks, notes):
        browser.get("/add", {"type": "note and raise"})

        worker.work()

        assert (tasks(), notes()) == ([("note and raise", "failed")], [])

    def test_where_it_dooms_its_transaction_nothing_does(self, browser, worker, tasks, notes):
        browser.get("/add", {"type": "note and doom"})

        worker.work()

        assert (tasks(), notes()) == ([("note and doom", "completed")], [])
