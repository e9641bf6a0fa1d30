"""PgQueuer 1.6, through asyncpg and through psycopg.

It follows the performance guide: `pgq autovac` after the installation, a direct connection for the worker, a
larger `batch_size` for short jobs. It runs on uvloop, as its own benchmark does, and keeps `durable`, its
default. Its jobs are coroutines on a single event loop, and it moves each finished row to a log table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, ClassVar

from benchmarks.contender import PADDING, TYPE, Contender, Work

BATCH = 1_000
"""The fastest of 10 (the default), 100, 500 and 1,000; several managers in a process were not faster."""
_TAIL = PADDING.encode()


def _payload(number: int) -> bytes:
    return b"%012d" % number + _TAIL


class PgQueuerAsyncpg(Contender):
    name = "PgQueuer asyncpg"
    needs = ("pgqueuer", "asyncpg", "uvloop")
    table = "pgqueuer"
    unfinished = "SELECT EXISTS (SELECT FROM pgqueuer)"
    finished = "SELECT count(DISTINCT job_id) FROM pgqueuer_log WHERE status = 'successful'"
    fills: ClassVar = {
        "due": """
            INSERT INTO pgqueuer (priority, entrypoint, payload, status)
            SELECT 0, 'bench', convert_to(lpad(n::text, 12, '0') || repeat('x', 80), 'UTF8'), 'queued'
            FROM generate_series(%(first)s, %(first)s + %(count)s - 1) n
        """,
    }

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        import uvloop

        return uvloop.run(coroutine)

    async def driver(self) -> Any:
        import asyncpg
        from pgqueuer.db import AsyncpgDriver

        self.connection: Any = await asyncpg.connect(self.url)
        return AsyncpgDriver(self.connection)

    def prepare(self) -> None:
        self.run(self._prepare())

    async def _prepare(self) -> None:
        await self.connect()
        await self.queries.install()
        await self.queries.optimize_autovacuum()
        await self.close()

    async def connect(self) -> None:
        from pgqueuer.queries import Queries

        self.queries = Queries(await self.driver())

    async def add(self, number: int) -> None:
        await self.queries.enqueue(TYPE, _payload(number))

    async def add_many(self, numbers: Iterable[int]) -> None:
        payloads: list[bytes | None] = [_payload(number) for number in numbers]
        await self.queries.enqueue([TYPE] * len(payloads), payloads, [0] * len(payloads))

    async def close(self) -> None:
        await self.connection.close()

    def work(self, work: Work) -> None:
        self.run(self._work(work))

    async def _work(self, work: Work) -> None:
        from pgqueuer import PgQueuer

        queuer = PgQueuer(await self.driver())

        @queuer.entrypoint(TYPE)
        async def handle(job: Any) -> None:
            await work.handle_async(int(job.payload[:12]))

        running = asyncio.create_task(queuer.run(batch_size=BATCH))
        stopped = asyncio.create_task(asyncio.to_thread(work.stop.wait))
        await asyncio.wait((running, stopped), return_when=asyncio.FIRST_COMPLETED)
        queuer.shutdown.set()
        await running
        await self.close()


class PgQueuerPsycopg(PgQueuerAsyncpg):
    name = "PgQueuer psycopg"
    needs = ("pgqueuer", "psycopg", "uvloop")

    async def driver(self) -> Any:
        import psycopg
        from pgqueuer.db import PsycopgDriver

        self.connection = await psycopg.AsyncConnection.connect(self.url, autocommit=True)
        return PsycopgDriver(self.connection)
