"""apoq in a FastAPI or Starlette application: a worker on its event loop, and a session for its routes.

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
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from apoq.core.retry import seconds
from apoq.errors import glimpse
from apoq.worker import Worker

STOP_TIMEOUT: Final = timedelta(seconds=20)
"""What running tasks get to end in: of the 30 s of gunicorn and Kubernetes, open requests take some, too."""


class lifespan(AbstractAsyncContextManager[None]):  # noqa: N801 - called as if it were a function
    """Works tasks on the application's event loop, from its start to its end.

    Either all of the application's lifespan, or a part of it:

        app = FastAPI(lifespan=apoq.fastapi.lifespan(worker))

        @asynccontextmanager
        async def lifespan(app):
            async with apoq.fastapi.lifespan(worker):
                yield
            await engine.dispose()

    At the end running tasks have `timeout` (seconds or a timedelta; None: as long as they like) to end in,
    while the loop goes on; what still runs then is given back, with no attempt used up. Where the database is
    away, the application starts, and work begins when it is there. Where apoq's tables are missing or at
    another version, it doesn't start: `SchemaMismatch` says what to do.
    """

    def __init__(self, worker: Worker, *, timeout: float | timedelta | None = STOP_TIMEOUT) -> None:
        """Prepare to start this worker with the application, and to stop it."""
        if not isinstance(worker, Worker):
            raise TypeError(f"lifespan takes a worker, such as Worker(engine, queue), not {glimpse(worker)}")
        self._worker = worker
        self._timeout = None if timeout is None else seconds(timeout, "a timeout")

    def __call__(self, _app: object) -> lifespan:
        """Be the lifespan of this application: what Starlette and FastAPI call."""
        return self

    async def __aenter__(self) -> None:
        """Start the worker."""
        loop = asyncio.get_running_loop()
        # On a thread, for it connects to the database, and waits a few seconds for one that is away.
        starting = asyncio.ensure_future(asyncio.to_thread(self._worker.start, loop=loop))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            with suppress(Exception):
                await starting  # for nothing cancels the thread
            await self._stop()
            raise

    async def __aexit__(self, *_: object) -> None:
        """Stop the worker."""
        await self._stop()

    async def _stop(self) -> None:
        # On a thread, for the coroutines that it waits for are on this loop.
        await asyncio.to_thread(self._worker.stop, self._timeout)


def transaction(make_session: async_sessionmaker[Any] | sessionmaker[Any]) -> Any:
    """Make the dependency that gives a FastAPI route a session, in a transaction of the request's own.

        SessionDep = Annotated[AsyncSession, transaction(async_sessionmaker(engine))]

    It commits when the route has returned and before the response is sent, so that a client never hears of
    what was not committed; and it is rolled back by what the route raises, `HTTPException` included. In
    tests, ``app.dependency_overrides[…]`` takes the `dependency` of what is answered here.
    """
    # Here, for Starlette alone may be what is installed.
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
        "transaction takes what makes sessions, such as async_sessionmaker(engine), "
        f"not {type(make_session).__qualname__}"
    )
