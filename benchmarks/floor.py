"""The floor: plain psycopg in batches on a minimal table. It shares no code with apoq.

It uses one connection and prepared statements. One statement claims 500 rows and another one settles them,
each in its own transaction. There are no attempts, tokens, priorities, retries or recovery. The limits are
the server's writes of two row versions per task with their index entries, and two fsyncs per batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import ClassVar

import psycopg
from psycopg.types.json import Jsonb

from benchmarks.contender import Contender, Work, document

BATCH = 500

TABLES = """
    CREATE TABLE floor_tasks (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        payload jsonb NOT NULL,
        state smallint NOT NULL DEFAULT 0
    );
    CREATE INDEX ON floor_tasks (id) WHERE state = 0;
"""
INSERT = "INSERT INTO floor_tasks (payload) VALUES (%s)"
INSERT_AND_NOTIFY = f"WITH added AS ({INSERT} RETURNING id) SELECT pg_notify('floor', '') FROM added"
CLAIM = """
    UPDATE floor_tasks SET state = 1
    WHERE id = ANY (ARRAY (
        SELECT id FROM floor_tasks WHERE state = 0 ORDER BY id LIMIT 500 FOR UPDATE SKIP LOCKED))
    RETURNING id, payload
"""
SETTLE = "UPDATE floor_tasks SET state = 2 WHERE id = ANY (%b)"


class Floor(Contender):
    name = "floor"
    needs = ("psycopg",)
    table = "floor_tasks"
    unfinished = """
        SELECT EXISTS (SELECT FROM floor_tasks WHERE state = 1)
            OR EXISTS (SELECT FROM floor_tasks WHERE state = 0)
    """
    finished = "SELECT count(*) FROM floor_tasks WHERE state = 2"
    fills: ClassVar = {
        "due": """
            INSERT INTO floor_tasks (payload)
            SELECT jsonb_build_object('n', n, 'padding', repeat('x', 80))
            FROM generate_series(%(first)s, %(first)s + %(count)s - 1) n
        """,
        "finished": """
            INSERT INTO floor_tasks (payload, state)
            SELECT jsonb_build_object('n', n, 'padding', repeat('x', 80)), 2
            FROM generate_series(1, %(count)s) n
        """,
    }

    def prepare(self) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(TABLES)

    async def connect(self) -> None:
        self.connection = psycopg.connect(self.url, autocommit=True)

    async def add(self, number: int) -> None:
        statement = INSERT_AND_NOTIFY if self.notify else INSERT
        self.connection.execute(statement, (Jsonb(document(number)),), prepare=True)

    async def add_many(self, numbers: Iterable[int]) -> None:
        # In COPY's text format, a backslash must be escaped.
        lines = [json.dumps(document(number)).replace("\\", "\\\\") + "\n" for number in numbers]
        with self.connection.transaction(), self.connection.cursor() as cursor:
            with cursor.copy("COPY floor_tasks (payload) FROM STDIN") as copy:
                copy.write("".join(lines))
            if self.notify:
                cursor.execute("SELECT pg_notify('floor', '')", prepare=True)

    async def close(self) -> None:
        self.connection.close()

    def work(self, work: Work) -> None:
        with (
            psycopg.connect(self.url, autocommit=True) as listener,
            psycopg.connect(self.url, autocommit=True) as connection,
            connection.cursor() as cursor,
        ):
            listener.execute("LISTEN floor")
            while not work.stop.is_set():
                rows = cursor.execute(CLAIM, prepare=True).fetchall()
                for _, payload in rows:
                    work.handle(payload["n"])
                if rows:
                    cursor.execute(SETTLE, ([row[0] for row in rows],), prepare=True)
                else:
                    for _ in listener.notifies(timeout=0.5, stop_after=1):
                        pass
