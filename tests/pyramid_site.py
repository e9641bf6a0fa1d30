"""A Pyramid application as the cookiecutter makes it: its notes say what has committed."""

from __future__ import annotations

import os

import sqlalchemy as sa
import zope.sqlalchemy
from pyramid.config import Configurator
from pyramid.httpexceptions import HTTPBadRequest
from pyramid.response import Response
from pyramid.threadlocal import get_current_request
from sqlalchemy.orm import DeclarativeBase, Mapped, configure_mappers, mapped_column, sessionmaker
from transaction.interfaces import TransientError

from apoq import Snooze, Task
from apoq.metrics import exposition
from apoq.pyramid import apoq_task


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


configure_mappers()


def add(request):
    """Only adds a task: the request reads and writes nothing else."""
    task = request.apoq.add(request.params.get("type", "note"), {"text": request.params.get("text", "")})
    return Response(str(task.id))


def add_many(request):
    return Response(str(request.apoq.add_many("note", [{"text": str(n)} for n in range(1_500)])))


def add_and_raise(request):
    add(request)
    raise ValueError("after it was added")


def add_and_refuse(request):
    add(request)
    raise HTTPBadRequest


def add_in_savepoint(request):
    """Add two, of which one is undone."""
    add(request)
    savepoint = request.tm.savepoint()
    add(request)
    savepoint.rollback()
    return Response("added")


def cancel(request):
    return Response(str(request.apoq.cancel(int(request.params["id"]), reason="not wanted")))


def retry(request):
    return Response(str(request.apoq.retry(int(request.params["id"]))))


def add_on_the_third_attempt(request):
    add(request)
    if request.environ["retry.attempt"] < 2:
        raise TransientError
    return Response("added")


def health(request):
    worker = request.apoq.worker
    return Response("healthy" if worker is not None and worker.is_healthy() else "no worker")


def metrics(request):
    content_type, body = exposition(request.apoq.worker.metrics, request.headers.get("Accept", ""))
    return Response(body, headerlist=[("Content-Type", content_type)])


def process_id(_request):
    return Response(str(os.getpid()))


VIEWS = [
    add,
    add_many,
    add_in_savepoint,
    add_and_raise,
    add_and_refuse,
    add_on_the_third_attempt,
    cancel,
    retry,
    health,
    metrics,
    process_id,
]


@apoq_task("note", retry_limit=0)
def note(task, request):
    request.dbsession.add(Note(text=task.data["text"]))


@apoq_task("note and raise", retry_limit=0)
def note_and_raise(task, request):
    note(task, request)
    request.dbsession.flush()
    raise ValueError("after it was noted")


@apoq_task("note twice", retry_limit=0)
def note_twice(task, request):
    """Write what the database refuses, and only when it is flushed at the end."""
    request.dbsession.add_all([Note(id=1, text="once"), Note(id=1, text="twice")])


@apoq_task("commit and raise", retry_limit=0)
def commit_and_raise(task, request):
    note(task, request)
    request.tm.commit()
    request.tm.begin()
    raise ValueError("after it was committed")


@apoq_task("be lost", retry_limit=0)
def be_lost(task, request):
    note(task, request)
    with request.registry["dbsession_factory"].begin() as session:
        session.delete(session.get_one(Task, task.id))


@apoq_task("note and snooze")
def note_and_snooze(task, request):
    note(task, request)
    raise Snooze(3600)


@apoq_task("note and doom", retry_limit=0)
def note_and_doom(task, request):
    note(task, request)
    request.tm.doom()


@apoq_task("note and add", retry_limit=0)
def note_and_add(task, request):
    note(task, request)
    request.apoq.add("note", {"text": "by another task"})


@apoq_task("note the request", retry_limit=0)
def note_the_request(task, request):
    assert (get_current_request(), request.context) == (request, task)
    request.dbsession.add(Note(text=request.route_url("add")))
    request.add_finished_callback(lambda _request: FINISHED.append(task.id))


FINISHED: list[int] = []


@apoq_task("look at the pool", retry_limit=0)
def look_at_the_pool(task, request):
    assert request.registry["dbsession_factory"].kw["bind"].pool.checkedout() == 0


def add_session(config):
    """Do what the cookiecutter's `models/__init__.py` does."""
    config.include("pyramid_tm")
    config.include("pyramid_retry")
    engine = sa.create_engine(config.registry.settings["sqlalchemy.url"])
    factory = sessionmaker(bind=engine)
    config.registry["dbsession_factory"] = factory

    def dbsession(request):
        given = request.environ.get("app.dbsession")
        if given is None:
            given = factory(info={"request": request})
            zope.sqlalchemy.register(given, transaction_manager=request.tm)
        return given

    config.add_request_method(dbsession, reify=True)


def main(_global_config, **settings):
    settings.setdefault("tm.manager_hook", "pyramid_tm.explicit_manager")
    with Configurator(settings=settings) as config:
        add_session(config)
        config.include("apoq.pyramid")
        for view in VIEWS:
            config.add_route(view.__name__, f"/{view.__name__}")
            config.add_view(view, route_name=view.__name__)
        config.scan(__name__)
        return config.make_wsgi_app()
