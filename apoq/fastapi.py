"""Integration with FastAPI and Starlette: a worker on the application's event loop, and sessions for routes.

.. code-block:: python

    engine = create_async_engine(url)
    queue = Queue()
    worker = Worker(engine, queue)
    app = FastAPI(lifespan=lifespan(worker))
    SessionDep = Annotated[AsyncSession, transaction(async_sessionmaker(engine))]

    @app.post("/sign-up")
    async def sign_up(session: SessionDep) -> None:
        await queue.add(session, "send_welcome", {"user_id": 7})
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from apoq.core.retry import seconds
from apoq.errors import glimpse
from apoq.worker import Worker
from apoq.worker.execution.daemon_threads import DaemonExecutor

STOP_TIMEOUT: Final = timedelta(seconds=20)
"""The time that is left for running tasks at a shutdown, of the 30 s that gunicorn and Kubernetes give."""


class lifespan(AbstractAsyncContextManager[None]):  # noqa: N801 - called like a function
    """Runs a worker on the application's event loop, from the application's start to its shutdown.

    It is the application's lifespan, or a part of it:

        app = FastAPI(lifespan=apoq.fastapi.lifespan(worker))

        @asynccontextmanager
        async def lifespan(app):
            async with apoq.fastapi.lifespan(worker):
                yield
            await engine.dispose()

    If the database can't be reached, the application starts anyway, and the worker begins as soon as it can.
    If apoq's tables are missing or at another version, the application doesn't start: entering the lifespan
    raises `SchemaMismatch`.
    """

    def __init__(self, worker: Worker, *, timeout: float | timedelta | None = STOP_TIMEOUT) -> None:
        """Create a lifespan that starts and stops this worker.

        Args:
            worker: The worker.
            timeout: Longest time to wait for running tasks at the shutdown, in seconds or as a timedelta; see
                `Worker.stop`. 20 s by default, because gunicorn and Kubernetes kill a process after 30 s.
                None waits for ever.

        Raises:
            TypeError: If `worker` is not a worker, or `timeout` is not a number or a timedelta.
            ValueError: If `timeout` is out of range.
        """
        if not isinstance(worker, Worker):
            raise TypeError(f"worker must be a Worker, such as Worker(engine, queue), got {glimpse(worker)}")
        self._worker = worker
        self._timeout = None if timeout is None else seconds(timeout, "timeout")

    def __call__(self, _app: object) -> lifespan:
        """Return itself: Starlette and FastAPI call it with the application."""
        return self

    async def __aenter__(self) -> None:
        """Start the worker."""
        loop = asyncio.get_running_loop()
        # On a thread, because it connects to the database, and waits a few seconds for one that doesn't
        # respond.
        starting = asyncio.ensure_future(_on_a_thread(partial(self._worker.start, loop=loop)))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            with suppress(Exception):
                await starting  # because the thread can't be cancelled
            await self._stop()
            raise

    async def __aexit__(self, *_: object) -> None:
        """Stop the worker."""
        await self._stop()

    async def _stop(self) -> None:
        # On a thread, because it waits for coroutines on this loop.
        await _on_a_thread(partial(self._worker.stop, self._timeout))


async def _on_a_thread(function: Callable[[], object]) -> None:
    # Not on one of the application's executor, because tasks may have taken all of them.
    executor = DaemonExecutor()
    try:
        await asyncio.get_running_loop().run_in_executor(executor, function)
    finally:
        executor.shutdown()


def transaction(make_session: async_sessionmaker[Any] | sessionmaker[Any]) -> Any:
    """Return a dependency that gives a FastAPI route a session, with one transaction per request.

        SessionDep = Annotated[AsyncSession, transaction(async_sessionmaker(engine))]

    Args:
        make_session: A `sessionmaker` or an `async_sessionmaker`.

    Returns:
        A dependency for `Annotated`. In tests, its attribute `dependency` is the key for
        ``app.dependency_overrides``.

    Raises:
        TypeError: If `make_session` is neither.

    Note:
        The transaction is committed when the route has returned, before the response is sent, so the
        request fails if the commit fails. An exception from the route, `HTTPException` included, rolls it
        back.
    """
    # Here, because Starlette may be installed without FastAPI.
    from fastapi import Depends  # noqa: PLC0415

    # FastAPI's own default, "request", would commit after the response has been sent.
    return Depends(_dependency(make_session), scope="function")


def _dependency(make_session: object) -> Callable[[], object]:
    match make_session:
        case async_sessionmaker():

            async def begin_async() -> AsyncIterator[AsyncSession]:
                async with make_session.begin() as session:
                    yield session

            return begin_async
        case sessionmaker():

            def begin() -> Iterator[Session]:
                with make_session.begin() as session:
                    yield session

            return begin
    raise TypeError(
        "make_session must be a sessionmaker or an async_sessionmaker, such as async_sessionmaker(engine), "
        f"got {type(make_session).__qualname__}"
    )
