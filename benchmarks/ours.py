"""apoq itself, by its public API and with its default settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Self

import sqlalchemy as sa
from sqlalchemy.orm import Session

from apoq import Queue, Worker, database_url, prepare
from benchmarks.contender import TYPE, Contender, Work, document

STRIDE = 73
"""It has no common divisor with the number of queues, so that all queues get the same number of tasks."""

# All tasks have started when this is executed. It uses the log of claims, because a search among all tasks
# that have not ended would read the rows in front of them.
UNFINISHED = """
    EXISTS (
        SELECT FROM {schema}apoq_claims JOIN {schema}apoq_tasks ON id = ANY (task_ids) WHERE state = 'running'
    )
"""
FINISHED = "(SELECT count(*) FROM {schema}apoq_tasks WHERE state = 'completed' AND attempt = 1)"

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
    unfinished = "SELECT " + UNFINISHED.format(schema="")
    finished = "SELECT " + FINISHED.format(schema="")
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
        self.queues = self.all_queues()

    def all_queues(self) -> list[Queue]:
        return [Queue()]

    def place(self, number: int) -> int:
        """Return which of the queues has a task; consecutive tasks are in queues far from each other."""
        return number * STRIDE % len(self.queues)

    async def another(self) -> Self:
        # The threads of a program share an engine, and so its notifications.
        other = type(self)(self.url)
        other.engine, other.queues = self.engine, self.queues
        return other

    async def add(self, number: int) -> None:
        with Session(self.engine) as session:
            self.queues[self.place(number)].add(session, TYPE, document(number))
            session.commit()

    async def add_many(self, numbers: Iterable[int]) -> None:
        documents: list[list[Any]] = [[] for _ in self.queues]
        for number in numbers:
            documents[self.place(number)].append(document(number))
        with Session(self.engine) as session:
            for queue, found in zip(self.queues, documents, strict=True):
                if found:
                    queue.add_many(session, TYPE, found)
            session.commit()

    async def close(self) -> None:
        self.engine.dispose()

    def work(self, work: Work) -> None:
        engine = sa.create_engine(database_url(self.url), pool_size=work.concurrency)
        keep: dict[str, Any] = {} if work.prunes else {"keep_completed": None, "keep_failed": None}
        worker = Worker(engine, *self.all_queues(), concurrency=work.concurrency, **keep)
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
