"""apoq with many queues, in one schema or in a schema each, all worked by one worker."""

from __future__ import annotations

import sqlalchemy as sa

from apoq import Queue, database_url, prepare
from benchmarks.ours import FINISHED, UNFINISHED, Apoq

QUEUES = 200


class ManyQueues(Apoq):
    name = "apoq, 200 queues"

    def all_queues(self) -> list[Queue]:
        return [Queue(f"queue_{number}") for number in range(QUEUES)]


SCHEMAS = [f"tenant_{number}" for number in range(QUEUES)]


class ManySchemas(Apoq):
    name = "apoq, 200 schemas"
    table = ", ".join(f"{schema}.apoq_tasks" for schema in SCHEMAS)
    unfinished = "SELECT " + " OR ".join(UNFINISHED.format(schema=f"{schema}.") for schema in SCHEMAS)
    finished = "SELECT " + " + ".join(FINISHED.format(schema=f"{schema}.") for schema in SCHEMAS)

    def prepare(self) -> None:
        engine = sa.create_engine(database_url(self.url))
        for schema in SCHEMAS:
            prepare(engine, schema=schema)
        engine.dispose()

    def all_queues(self) -> list[Queue]:
        return [Queue(schema=schema) for schema in SCHEMAS]
