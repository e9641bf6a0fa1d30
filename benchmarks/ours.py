"""apoq itself, by its public API and with its default settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Self

import sqlalchemy as sa
from sqlalchemy.orm import Session

from apoq import Queue, Worker, database_url, prepare
from benchmarks.contender import TYPE, Contender, Work, document

_FILL = """
    INSERT INTO apoq_tasks (type, data, {columns})
    SELECT {type}, jsonb_build_object('n', n, 'padding', repeat('x', 80)), {values}
    FROM generate_series({first}, {last}) n
"""


def _fill(columns: str, values: str, *, type_: str = f"'{TYPE}'") -> str:
    return _FILL.format(
        columns=columns, values=values, type=type_, first="%(first)s", last="%(first)s + %(count)s - 1"
    )


class Apoq(Contender):
    name = "apoq"
    table = "apoq_tasks"
    # All tasks have started when this is executed. It uses the log of claims, because a search among all
    # tasks that have not ended would read the rows in front of them.
    unfinished = """
        SELECT EXISTS (
            SELECT FROM apoq_claims JOIN apoq_tasks ON id = ANY (task_ids) WHERE state = 'running'
        )
    """
    finished = "SELECT count(*) FROM apoq_tasks WHERE state = 'completed' AND attempt = 1"
    fills: ClassVar = {
        "due": _fill("priority", "0"),
        "others": _fill("process_at", "now() - interval '1 hour'", type_="'others'"),
        "future": _fill("priority, process_at", "10, now() + interval '1 day'"),
        # Their retention is over. Their attempt is 0, to distinguish them from the tasks of the benchmark.
        "finished": _fill("state, completed_at", "'completed', now() - interval '2 days'"),
    }
    engine: sa.Engine

    def prepare(self) -> None:
        engine = sa.create_engine(database_url(self.url))
        prepare(engine)
        engine.dispose()

    async def connect(self) -> None:
        self.engine = sa.create_engine(database_url(self.url), pool_size=10)
        self.queue = Queue()

    def another(self) -> Self:
        # The threads of a program share an engine, and so its notifications.
        other = super().another()
        other.engine, other.queue = self.engine, self.queue
        return other

    async def add(self, number: int) -> None:
        with Session(self.engine) as session:
            self.queue.add(session, TYPE, document(number))
            session.commit()

    async def add_many(self, numbers: Iterable[int]) -> None:
        with Session(self.engine) as session:
            self.queue.add_many(session, TYPE, [document(number) for number in numbers])
            session.commit()

    async def close(self) -> None:
        self.engine.dispose()

    def work(self, work: Work) -> None:
        engine = sa.create_engine(database_url(self.url), pool_size=work.concurrency)
        keep: dict[str, Any] = {} if work.prunes else {"keep_completed": None, "keep_failed": None}
        worker = Worker(engine, concurrency=work.concurrency, **keep)
        worker.use(TYPE, _processor(work))
        worker.start()
        work.stop.wait()
        worker.stop()
        engine.dispose()


def _processor(work: Work) -> Any:
    def plain(task: Any) -> None:
        work.handle(task.data["n"])

    async def coroutine(task: Any) -> None:
        await work.handle_async(task.data["n"])

    effect = sa.text("INSERT INTO effects (n) VALUES (:n)")

    def session(task: Any) -> None:
        work.handle(task.data["n"])
        task.session.execute(effect, {"n": task.data["n"]})

    return {"plain": plain, "coroutine": coroutine, "session": session}[work.kind]
