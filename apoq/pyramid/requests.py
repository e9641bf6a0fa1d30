"""The requests in which tasks are added, and those in which they are run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Unpack

from pyramid.interfaces import IRequestFactory
from pyramid.registry import Registry
from pyramid.request import Request, apply_request_extensions
from pyramid.threadlocal import RequestContext
from sqlalchemy import Engine
from sqlalchemy.orm import Session, scoped_session

from apoq.client.session_adapters import COMMITS_WITH, bind_of
from apoq.core.options import Options
from apoq.errors import UnsupportedSession
from apoq.pyramid.settings import Misconfigured, Settings
from apoq.schema.models import Task
from apoq.worker import RunningTask, Worker

logger = logging.getLogger(__name__)


class RequestTasks:
    """Adds tasks, cancels them and runs them once more, in a request's transaction: ``request.apoq``."""

    def __init__(self, request: Any, settings: Settings, worker: Worker | None) -> None:
        self._request = request
        self._session_name = settings.session
        self.queue = settings.make_queue()
        self.worker = worker
        """The in-process worker of this process, where there is one: ask whether it is `is_healthy()`."""

    @property
    def session(self) -> Session | scoped_session[Session]:
        """The request's session."""
        return session_of(self._request, self._session_name)

    def add(self, type: str, data: Any = {}, **options: Unpack[Options]) -> Task:  # noqa: B006 - never changed
        """Add a task, which is there when the request's transaction has committed; see `Queue.add`."""
        return self.queue.add(self.session, type, data, **options)

    def add_many(self, type: str, items: Iterable[Any], **options: Unpack[Options]) -> int:
        """Add a task for each of `items`, and answer how many there were; see `Queue.add_many`."""
        return self.queue.add_many(self.session, type, items, **options)

    def cancel(self, task: Task | int, *, reason: str = "") -> bool:
        """Cancel a task, or the one with this id, and answer whether it did; see `Queue.cancel`."""
        return self.queue.cancel(self.session, task, reason=reason)

    def retry(self, task: Task | int, *, delay: timedelta | None = None) -> bool:
        """Run a task once more that has ended, and answer whether it will be; see `Queue.retry`."""
        return self.queue.retry(self.session, task, delay=delay)


class Requests:
    """Makes a request for each task, with all that the application adds to one, and a transaction of its own.

    The application's session is put into the transaction of ``task.session``, within a savepoint: what the
    processor writes through it commits with the task's completion.
    """

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self._registry = registry
        self._session_name = settings.session
        self._base_url = settings.base_url
        with self._request() as request:
            session = session_of(request, settings.session)
            try:
                found = session() if isinstance(session, scoped_session) else session
                self.engine: Engine = bind_of(found).engine
                """What the application's sessions write tasks to."""
            except UnsupportedSession as error:
                raise Misconfigured(f"`request.{settings.session}` can't be used: {error}") from error
            _release(session)

    @contextmanager
    def middleware(self, task: RunningTask) -> Iterator[None]:
        """Make a request current, in whose transaction this task is processed."""
        with self._request() as request:
            request.context = task
            self._join(request, task)
            try:
                with _transaction(request, self._session_name):
                    yield
            finally:
                if self._session_name in vars(request):
                    _release(vars(request)[self._session_name])

    @contextmanager
    def _request(self) -> Iterator[Any]:
        factory = self._registry.queryUtility(IRequestFactory, default=Request)
        request = factory.blank("/", base_url=self._base_url)
        request.registry = self._registry
        with RequestContext(request):
            # Not pyramid.scripting.prepare: it calls the root factory, which may well use the session, for
            # which there is no transaction yet.
            apply_request_extensions(request)
            try:
                yield request
            finally:
                if request.finished_callbacks:
                    request._process_finished_callbacks()  # noqa: SLF001 - as prepare's closer does

    def _join(self, request: Any, task: RunningTask) -> None:
        def make(request: Any) -> Any:
            session = getattr(super(above, request), self._session_name)
            join(session() if isinstance(session, scoped_session) else session, task, self.engine)
            return session

        # Made when it is first asked for, so that a processor that doesn't use it holds no connection.
        request.set_property(make, name=self._session_name, reify=True)
        above = type(request)


def join(session: Session, task: RunningTask, engine: Engine) -> None:
    """Have a session do in the transaction of ``task.session`` what it would have done on this engine."""
    find = session.get_bind

    def get_bind(*arguments: Any, **keywords: Any) -> Any:
        bind = find(*arguments, **keywords)
        if bind is not engine:
            return bind
        session.info[COMMITS_WITH] = task.session
        return task.session.connection()

    session.get_bind = get_bind  # type: ignore[method-assign]
    session.join_transaction_mode = "create_savepoint"


@contextmanager
def _transaction(request: Any, session_name: str) -> Iterator[None]:
    """Do what pyramid_tm does around a view, or else what most applications do without it."""
    if not hasattr(request, "tm"):
        yield
        if session_name in vars(request):
            vars(request)[session_name].commit()
        return
    manager = request.tm
    request.environ.update({"tm.active": True, "tm.manager": manager})
    manager.begin()
    try:
        yield
        if manager.isDoomed():
            manager.abort()
        else:
            manager.commit()
    except BaseException:
        try:
            manager.abort()
        except Exception as error:  # noqa: BLE001 - what was raised before is what matters
            logger.debug("a task's transaction could not be aborted: %s", error)
        raise


def session_of(request: Any, name: str) -> Session | scoped_session[Session]:
    """Answer a request's session; `Misconfigured` where it has none."""
    try:
        session: Session | scoped_session[Session] = getattr(request, name)
    except AttributeError as error:
        raise Misconfigured(
            f"this application's requests have no `{name}`: add one that answers a SQLAlchemy session, as "
            "Pyramid's cookiecutter does, or name the attribute that does in the setting apoq.session"
        ) from error
    return session


def _release(session: Session | scoped_session[Session]) -> None:
    if isinstance(session, scoped_session):
        session.remove()  # else this thread would have it for ever, and the next task too
    else:
        session.close()
