"""Procrastinate 3.10 with its asyncio connector, coroutine tasks, and the worker's `concurrency`.

It fetches and finishes each job by separate statements, so it is limited by two commits per job; with more
concurrency, several commits share an fsync. It gets a twentieth of the others' tasks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any, ClassVar

from benchmarks.contender import PADDING, TYPE, Contender, Work

CONCURRENCY = 10
"""Its documentation doesn't recommend a number; from 4 to 50, there is little difference here."""


class Procrastinate(Contender):
    name = "Procrastinate"
    needs = ("procrastinate",)
    share = 0.05
    table = "procrastinate_jobs"
    unfinished = "SELECT EXISTS (SELECT FROM procrastinate_jobs WHERE status IN ('todo', 'doing'))"
    finished = "SELECT count(*) FROM procrastinate_jobs WHERE status = 'succeeded' AND attempts = 1"
    fills: ClassVar = {
        "due": """
            INSERT INTO procrastinate_jobs (queue_name, task_name, args)
            SELECT 'default', 'bench', jsonb_build_object('n', n, 'padding', repeat('x', 80))
            FROM generate_series(%(first)s, %(first)s + %(count)s - 1) n
        """,
    }

    def _open(self, work: Work | None = None) -> None:
        from procrastinate import App, PsycopgConnector

        logging.getLogger("procrastinate").setLevel(logging.WARNING)
        self.app = App(connector=PsycopgConnector(conninfo=self.url, min_size=1, max_size=10))

        @self.app.task(name=TYPE)
        async def handle(n: int, padding: str) -> None:  # noqa: ARG001
            assert work is not None
            await work.handle_async(n)

        self.task: Any = handle

    def prepare(self) -> None:
        self.run(self._prepare())

    async def _prepare(self) -> None:
        await self.connect()
        await self.app.schema_manager.apply_schema_async()
        await self.close()

    async def connect(self) -> None:
        self._open()
        await self.app.open_async()

    async def add(self, number: int) -> None:
        await self.task.defer_async(n=number, padding=PADDING)

    async def add_many(self, numbers: Iterable[int]) -> None:
        await self.task.batch_defer_async(*({"n": number, "padding": PADDING} for number in numbers))

    async def close(self) -> None:
        await self.app.close_async()

    def work(self, work: Work) -> None:
        self.run(self._work(work))

    async def _work(self, work: Work) -> None:
        self._open(work)
        concurrency = work.concurrency if work.seconds else CONCURRENCY
        async with self.app.open_async():
            running = asyncio.create_task(
                self.app.run_worker_async(concurrency=concurrency, install_signal_handlers=False)
            )
            stopped = asyncio.create_task(asyncio.to_thread(work.stop.wait))
            await asyncio.wait((running, stopped), return_when=asyncio.FIRST_COMPLETED)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
