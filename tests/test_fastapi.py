"""FastAPI and Starlette: a worker on the application's loop, and a session for its routes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from apoq import AsyncRunningTask, Queue, RunningTask, SchemaMismatch, Task, Worker, prepare
from apoq.fastapi import lifespan, transaction

queue = Queue()


@asynccontextmanager
async def alive(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    """Run an application as a server does; answer a client of it."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield client


def on(url: sa.URL, main: Callable[[AsyncEngine], Coroutine[Any, Any, None]]) -> None:
    """Run this on an event loop of its own, with an engine."""

    async def run() -> None:
        engine = create_async_engine(url)
        try:
            async with asyncio.timeout(30):
                await main(engine)
        finally:
            await engine.dispose()

    asyncio.run(run())


async def add(engine: AsyncEngine, type_: str = "t") -> int:
    async with AsyncSession(engine) as session, session.begin():
        return (await queue.add(session, type_)).id


async def found(engine: AsyncEngine) -> list[tuple[Any, ...]]:
    async with engine.connect() as connection:
        rows = await connection.execute(sa.select(Task.type, Task.state, Task.fail_count).order_by(Task.id))
        return [tuple(row) for row in rows]


class TestTheLifespan:
    @pytest.mark.parametrize("kind", [FastAPI, Starlette])
    def test_coroutines_run_on_the_applications_loop_and_engine(self, url, kind):
        async def main(engine: AsyncEngine) -> None:
            ran: asyncio.Future[tuple[object, object]] = asyncio.Future()

            async def process(task: AsyncRunningTask) -> None:
                connection = await task.session.connection()
                ran.set_result((asyncio.get_running_loop(), connection.engine))

            worker = Worker(engine, queue)
            worker.use("t", process)
            async with alive(kind(lifespan=lifespan(worker))):
                await add(engine)
                assert await ran == (asyncio.get_running_loop(), engine)

            assert await found(engine) == [("t", "completed", 0)]

        on(url, main)

    def test_it_is_part_of_the_applications_own(self, url):
        async def main(engine: AsyncEngine) -> None:
            seen: list[bool] = []
            worker = Worker(engine, queue)

            @asynccontextmanager
            async def own(_app: FastAPI) -> AsyncIterator[dict[str, str]]:
                async with lifespan(worker):
                    seen.append(worker.is_healthy())
                    yield {"name": "Ada"}
                seen.append(worker.is_healthy())

            app = FastAPI(lifespan=own)
            async with app.router.lifespan_context(app) as state:
                assert state == {"name": "Ada"}

            assert seen == [True, False]

        on(url, main)

    def test_a_plain_function_runs_beside_it(self, url):
        async def main(engine: AsyncEngine) -> None:
            loop, ran = asyncio.get_running_loop(), asyncio.Event()

            def process(task: RunningTask) -> None:
                task.session.execute(
                    sa.insert(sa.table("ledger", sa.column("task_id"))), {"task_id": task.id}
                )
                loop.call_soon_threadsafe(ran.set)

            worker = Worker(engine, queue)
            worker.use("t", process)
            async with alive(FastAPI(lifespan=lifespan(worker))):
                await add(engine)
                await ran.wait()

            async with engine.connect() as connection:
                assert await connection.scalar(sa.text("SELECT count(*) FROM ledger")) == 1

        on(url, main)

    def test_it_begins_again_with_the_next_application(self, engine, url):
        """As in tests, of which each starts the application on a loop of its own."""
        ran: list[int] = []
        async_engine = create_async_engine(url, poolclass=sa.pool.NullPool)
        worker = Worker(async_engine, queue)
        app = FastAPI(lifespan=lifespan(worker))

        async def process(task: AsyncRunningTask) -> None:
            await (await task.session.connection()).execute(sa.text("SELECT 1"))
            ran.append(task.id)
            done.set()

        worker.use("t", process)

        async def main() -> None:
            async with alive(app):
                await add(async_engine)
                await done.wait()

        for _ in range(2):
            done = asyncio.Event()
            asyncio.run(main())

        assert len(ran) == 2

    def test_health_is_a_route(self, url):
        async def main(engine: AsyncEngine) -> None:
            worker = Worker(engine, queue)

            async def health(_request: Request) -> JSONResponse:
                return JSONResponse({}, 200 if worker.is_healthy() else 503)

            app = Starlette(routes=[Route("/health", health)], lifespan=lifespan(worker))
            async with alive(app) as client:
                assert (await client.get("/health")).status_code == 200
                await asyncio.to_thread(worker.stop)
                assert (await client.get("/health")).status_code == 503

        on(url, main)

    @pytest.mark.parametrize("wrong", [None, "worker", queue])
    def test_it_takes_a_worker(self, wrong):
        with pytest.raises(TypeError, match=r"worker must be a Worker, such as Worker\(engine, queue\)"):
            lifespan(wrong)

    def test_a_timeout_is_a_time(self, url):
        with pytest.raises((TypeError, ValueError), match="timeout must be"):
            lifespan(Worker(create_async_engine(url), queue), timeout=-1)


class TestItsEnd:
    def test_a_running_coroutine_ends_on_a_loop_that_goes_on(self, url):
        async def main(engine: AsyncEngine) -> None:
            runs = asyncio.Event()

            async def process(task: AsyncRunningTask) -> None:
                runs.set()
                while not task.should_stop:  # noqa: ASYNC110 - it is what a processor does
                    await asyncio.sleep(0.001)
                await task.session.execute(sa.text("SELECT 1"))

            worker = Worker(engine, queue)
            worker.use("t", process)
            async with lifespan(worker):
                await add(engine)
                await runs.wait()

            assert await found(engine) == [("t", "completed", 0)]

        on(url, main)

    def test_what_takes_too_long_is_given_back_with_no_attempt_used_up(self, url):
        async def main(engine: AsyncEngine) -> None:
            runs, ended = asyncio.Event(), asyncio.Event()

            async def process(_task: AsyncRunningTask) -> None:
                runs.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    ended.set()

            worker = Worker(engine, queue)
            worker.use("t", process)
            async with lifespan(worker, timeout=timedelta(milliseconds=50)):
                await add(engine)
                await runs.wait()

            assert ended.is_set()
            assert await found(engine) == [("t", "pending", 0)]

        on(url, main)

    def test_a_lifespan_that_raises_stops_the_worker(self, url):
        async def main(engine: AsyncEngine) -> None:
            worker = Worker(engine, queue)
            with pytest.raises(ZeroDivisionError):
                async with lifespan(worker):
                    raise ZeroDivisionError
            assert not worker.is_healthy()

        on(url, main)

    def test_a_start_that_is_cancelled_leaves_no_worker(self, url):
        async def main(engine: AsyncEngine) -> None:
            worker = Worker(engine, queue)
            start = asyncio.ensure_future(lifespan(worker).__aenter__())
            await asyncio.sleep(0)
            start.cancel()
            with pytest.raises(asyncio.CancelledError):
                await start
            assert not worker.is_healthy()
            async with engine.connect() as connection:
                assert await connection.scalar(sa.text("SELECT count(*) FROM apoq_workers")) == 0

        on(url, main)


class TestTheDatabase:
    def test_while_it_is_away_the_application_starts(self):
        async def main() -> None:
            # Nobody listens on this port.
            worker = Worker(create_async_engine("postgresql+psycopg://127.0.0.1:1/nothing"), queue)

            async def health(_request: Request) -> JSONResponse:
                return JSONResponse({"worker": worker.is_healthy()})

            app = Starlette(routes=[Route("/health", health)], lifespan=lifespan(worker))
            async with alive(app) as client:
                assert (await client.get("/health")).json() == {"worker": False}

        asyncio.run(main())

    def test_without_our_tables_it_does_not_start_and_says_why(self, empty_url):
        async def main(engine: AsyncEngine) -> None:
            with pytest.raises(SchemaMismatch, match=r"apoq's tables are missing.*run `apoq migrate`"):
                async with alive(FastAPI(lifespan=lifespan(Worker(engine, queue)))):
                    pass

        on(empty_url, main)


SERVED = """
import asyncio, os
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import create_async_engine
from apoq import Queue, Worker
from apoq.fastapi import lifespan

queue = Queue()
worker = Worker(create_async_engine(os.environ["DATABASE_URL"]), queue)
app = FastAPI(lifespan=lifespan(worker, timeout=0.1))

@queue.task(type="endless")
async def endless() -> None:
    print("it runs", flush=True)
    await asyncio.Event().wait()
"""


@pytest.mark.parametrize("options", [(), ("--reload",)])
def test_a_server_that_is_told_to_end_does_so_and_leaves_the_task_to_others(engine, url, tmp_path, options):
    (tmp_path / "served.py").write_text(SERVED)
    command = [sys.executable, "-m", "uvicorn", "served:app", "--port", "0", *options]
    with engine.begin() as connection:
        queue.add(connection, "endless")

    log = tmp_path / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, "DATABASE_URL": url.render_as_string(hide_password=False)},
            stdout=subprocess.PIPE,
            stderr=output,
        ) as server,
    ):
        assert server.stdout.readline() == b"it runs\n", log.read_text()
        server.terminate()
        server.wait(15)

    assert "Application shutdown complete" in log.read_text()
    assert "Traceback" not in log.read_text()
    with engine.connect() as connection:
        (task,) = connection.execute(sa.select(Task.state, Task.fail_count, Task.attempt))
        assert tuple(task) == ("pending", 0, 0)


class Site:
    """Routes that add a task in a session of a dependency, and what has happened in which order."""

    def __init__(self, engine: AsyncEngine | sa.Engine, dependency: Any) -> None:
        self.api = FastAPI()
        self.happened: list[str] = []
        sync = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
        sa.event.listen(sync, "commit", lambda _: self.happened.append("commit"))
        sa.event.listen(sync, "rollback", lambda _: self.happened.append("rollback"))

        @self.api.post("/add")
        async def add(session: AsyncSession = dependency) -> None:
            await queue.add(session, "t")

        @self.api.post("/add-plain")
        def add_plain(session: Session = dependency) -> None:
            queue.add(session, "t")

        @self.api.post("/teapot")
        async def teapot(session: AsyncSession = dependency) -> None:
            await queue.add(session, "t")
            raise HTTPException(418)

        @self.api.post("/teapot-plain")
        def teapot_plain(session: Session = dependency) -> None:
            queue.add(session, "t")
            raise HTTPException(418)

        @self.api.post("/broken")
        async def broken(session: AsyncSession = dependency) -> None:
            await queue.add(session, "t")
            # Found out by the commit, and no sooner.
            await session.execute(
                sa.text("CREATE TEMPORARY TABLE once (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
            )
            await session.execute(sa.text("INSERT INTO once VALUES (1), (1)"))

    async def post(self, path: str) -> int:
        async def watched(scope: Any, receive: Any, send: Any) -> None:
            async def watch(message: Any) -> None:
                if message["type"] == "http.response.start":
                    self.happened.append(f"sent {message['status']}")
                await send(message)

            await self.api(scope, receive, watch)

        transport = httpx.ASGITransport(watched, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return (await client.post(path)).status_code


class TestTheTransaction:
    @pytest.mark.parametrize("path", ["/add", "/add-plain"])
    def test_it_commits_before_the_response_is_sent(self, engine, url, path):
        async def main(async_engine: AsyncEngine) -> None:
            site = _site(path, engine, async_engine)

            await site.post(path)

            assert site.happened == ["commit", "sent 200"]
            assert await found(async_engine) == [("t", "pending", 0)]

        on(url, main)

    @pytest.mark.parametrize("path", ["/teapot", "/teapot-plain"])
    def test_what_the_route_raises_rolls_it_back(self, engine, url, path):
        async def main(async_engine: AsyncEngine) -> None:
            site = _site(path, engine, async_engine)

            await site.post(path)

            assert site.happened == ["rollback", "sent 418"]
            assert await found(async_engine) == []

        on(url, main)

    def test_a_commit_that_fails_is_what_the_client_hears(self, url):
        async def main(engine: AsyncEngine) -> None:
            site = Site(engine, transaction(async_sessionmaker(engine)))

            assert await site.post("/broken") == 500

            assert await found(engine) == []

        on(url, main)

    def test_by_fastapis_default_a_client_hears_of_what_was_never_committed(self, url):
        """What it is here for: where this fails, FastAPI has changed, and the docs are to say so."""

        async def main(engine: AsyncEngine) -> None:
            async def get_session() -> AsyncIterator[AsyncSession]:
                async with AsyncSession(engine) as session, session.begin():
                    yield session

            site = Site(engine, Depends(get_session))

            assert await site.post("/broken") == 200

            assert await found(engine) == []

        on(url, main)

    def test_a_test_puts_a_session_of_its_own_in_its_place(self, url):
        async def main(engine: AsyncEngine) -> None:
            in_transaction = transaction(async_sessionmaker(engine))
            site = Site(engine, in_transaction)
            async with AsyncSession(engine) as session:
                site.api.dependency_overrides[in_transaction.dependency] = lambda: session

                await site.post("/add")

                assert await session.scalar(sa.select(sa.func.count()).select_from(Task)) == 1
                await session.rollback()

            assert await found(engine) == []

        on(url, main)

    @pytest.mark.parametrize("wrong", [None, "engine", Session, sa.create_engine("postgresql+psycopg://")])
    def test_it_takes_what_makes_sessions(self, wrong):
        with pytest.raises(TypeError, match=r"make_session must be a sessionmaker or an async_sessionmaker"):
            transaction(wrong)


def _site(path: str, engine: sa.Engine, async_engine: AsyncEngine) -> Site:
    if path.endswith("-plain"):
        return Site(engine, transaction(sessionmaker(engine)))
    return Site(async_engine, transaction(async_sessionmaker(async_engine)))


def test_its_documentation_runs(empty_url, monkeypatch, capsys, run_page):
    monkeypatch.setenv("DATABASE_URL", empty_url.render_as_string(hide_password=False))
    main = run_page("fastapi.md", "main")

    async def run() -> None:
        done = asyncio.Event()
        loop = asyncio.get_running_loop()
        main["worker"].events.on("task.completed", lambda _: loop.call_soon_threadsafe(done.set))
        async with main["engine"].begin() as connection:
            await connection.run_sync(main["Base"].metadata.create_all)
        await prepare(main["engine"])
        await main["test_a_new_user_is_welcomed"]()
        async with alive(main["app"]) as client:
            assert (await client.get("/health")).json() == {"worker": True}
            for path in ("/sign-up", "/users"):
                assert (await client.post(path, json={"email": f"bob@{path}"})).is_success
                await done.wait()
                done.clear()
        async with alive(main["starlette"]) as client:
            assert (await client.post("/sign-up", json={"email": "bob@starlette"})).status_code == 201
            await done.wait()

    asyncio.run(asyncio.wait_for(run(), 30))

    said = capsys.readouterr().out.split("📧 welcome, ")
    assert [line.strip() for line in said[1:]] == [
        "ada@example.org",
        "bob@/sign-up",
        "bob@/users",
        "bob@starlette",
    ]


def test_neither_fastapi_nor_starlette_is_imported():
    program = (
        "import sys, apoq.fastapi; sys.exit(bool({'fastapi', 'starlette', 'alembic'} & set(sys.modules)))"
    )

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
