"""Requests: `request.apoq`, which adds tasks, and the requests in which processors run."""

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
    """Adds, cancels and retries tasks in the request's transaction: ``request.apoq``.

    Attributes:
        queue (Queue): The application's queue, by the settings ``apoq.queue`` and ``apoq.schema``.
        worker (Worker | None): The in-process worker, if there is one. Its `is_healthy` is for health checks.
    """

    def __init__(self, request: Any, settings: Settings, worker: Worker | None) -> None:
        self._request = request
        self._session_name = settings.session
        self.queue = settings.make_queue()
        self.worker = worker

    @property
    def session(self) -> Session | scoped_session[Session]:
        """The request's session, by the setting ``apoq.session``.

        Raises:
            Misconfigured: If the request has no such session.
        """
        return session_of(self._request, self._session_name)

    def add(self, type: str, data: Any = {}, **options: Unpack[Options]) -> Task:  # noqa: B006 - unchanged
        """Add a task in the request's transaction, and return it; see `Queue.add`.

        Args:
            type: The task's type, by which a worker finds its processor.
            data: The task's data: anything that JSON can represent. An empty dict by default.
            **options: The options of `Queue.add`, such as `delay` and `priority`.

        Returns:
            The new `Task`, with its id. It exists for workers when the request's transaction is committed.

        Raises:
            InvalidTask: If the type or an option is invalid. Nothing was sent.
            InvalidData: If the data can't be stored, or is too large. Nothing was sent.
            SchemaMismatch: If apoq's tables are missing or at another version.
            Misconfigured: If the request has no session.
        """
        return self.queue.add(self.session, type, data, **options)

    def add_many(self, type: str, items: Iterable[Any], **options: Unpack[Options]) -> int:
        """Add a task for each of `items` in the request's transaction; see `Queue.add_many`.

        Args:
            type: The type of all these tasks.
            items: The data of each task.
            **options: The options of `Queue.add`, for all these tasks.

        Returns:
            The number of tasks.

        Raises:
            InvalidTask: If the type or an option is invalid, or `items` is not an iterable of data.
            InvalidData: If one of the items can't be stored. Earlier items may already be inserted.
            SchemaMismatch: If apoq's tables are missing or at another version.
            Misconfigured: If the request has no session.
        """
        return self.queue.add_many(self.session, type, items, **options)

    def cancel(self, task: Task | int, *, reason: str = "") -> bool:
        """Cancel a task in the request's transaction; see `Queue.cancel`.

        Args:
            task: The task, or its id.
            reason: A text that is stored in the task's `error`.

        Returns:
            True if the task was cancelled; False if it had already ended, or is not in this queue.

        Raises:
            InvalidTask: If `task` is not a task of this schema or an id, or `reason` is not text.
            SchemaMismatch: If apoq's tables are missing or at another version.
            Misconfigured: If the request has no session.
        """
        return self.queue.cancel(self.session, task, reason=reason)

    def retry(self, task: Task | int, *, delay: float | timedelta | None = None) -> bool:
        """Run an ended task again; see `Queue.retry`.

        Args:
            task: The task, or its id.
            delay: Time until the task is due, in seconds or as a timedelta. By default it is due at once.

        Returns:
            True if the task will run again; False if it has not ended, or is not in this queue.

        Raises:
            InvalidTask: If `task` is not a task of this schema or an id, or `delay` is invalid.
            SchemaMismatch: If apoq's tables are missing or at another version.
            Misconfigured: If the request has no session.
        """
        return self.queue.retry(self.session, task, delay=delay)


class Requests:
    """Creates a request for each task, with the application's request methods and its own transaction.

    The application's session joins the transaction of ``task.session`` with a savepoint, so that its writes
    are committed together with the task's completion.
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
                """The engine to which the application's sessions write tasks."""
            except UnsupportedSession as error:
                raise Misconfigured(f"`request.{settings.session}` is not usable: {error}") from error
            _release(session)

    @contextmanager
    def middleware(self, task: RunningTask) -> Iterator[None]:
        """Enter a new request and its transaction, in which this task is processed."""
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
            # Not pyramid.scripting.prepare, because it calls the root factory, which may use the session
            # before its transaction has begun.
            apply_request_extensions(request)
            try:
                yield request
            finally:
                if request.finished_callbacks:
                    request._process_finished_callbacks()  # noqa: SLF001 - as the closer of `prepare` does

    def _join(self, request: Any, task: RunningTask) -> None:
        def make(request: Any) -> Any:
            session = getattr(super(above, request), self._session_name)
            join(session() if isinstance(session, scoped_session) else session, task, self.engine)
            return session

        # Created at the first use, so that a processor without a session needs no connection.
        request.set_property(make, name=self._session_name, reify=True)
        above = type(request)


def join(session: Session, task: RunningTask, engine: Engine) -> None:
    """Make a session use the connection of ``task.session`` instead of this engine."""
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
    """Begin and end the request's transaction like pyramid_tm; without it, commit the session at the end."""
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
        except Exception as error:  # noqa: BLE001 - the earlier exception is raised
            logger.debug("a task's transaction could not be aborted: %s", error)
        raise


def session_of(request: Any, name: str) -> Session | scoped_session[Session]:
    """Return a request's session; raise `Misconfigured` if it has none."""
    try:
        session: Session | scoped_session[Session] = getattr(request, name)
    except AttributeError as error:
        raise Misconfigured(
            f"this application's requests must have an attribute `{name}` that is a SQLAlchemy session: add "
            "it, as in Pyramid's cookiecutter, or set apoq.session to the name of another attribute"
        ) from error
    return session


def _release(session: Session | scoped_session[Session]) -> None:
    if isinstance(session, scoped_session):
        session.remove()  # otherwise the next task on this thread would use the same session
    else:
        session.close()
