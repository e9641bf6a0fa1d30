"""Baselines: an application without a queue, to measure the cost that apoq adds."""

from __future__ import annotations

import time
from typing import Any, Self

import psycopg
import sqlalchemy as sa
from psycopg.types.json import Jsonb
from sqlalchemy.orm import Session

from apoq import Task, database_url, prepare
from benchmarks.contender import TYPE, Contender, document


class Orm(Contender):
    """The same row, added and committed as any other ORM object: no Queue, no notification."""

    name = "plain ORM"
    table = "apoq_tasks"
    finished = "SELECT count(*) FROM apoq_tasks"
    engine: sa.Engine

    def prepare(self) -> None:
        engine = sa.create_engine(database_url(self.url))
        prepare(engine)
        engine.dispose()

    async def connect(self) -> None:
        self.engine = sa.create_engine(database_url(self.url), pool_size=10)

    async def another(self) -> Self:
        other = type(self)(self.url)
        other.engine = self.engine
        return other

    async def add(self, number: int) -> None:
        with Session(self.engine) as session:
            session.add(Task(type=TYPE, data=document(number)))
            session.commit()

    async def close(self) -> None:
        self.engine.dispose()


class Plain(Contender):
    """An insert into a minimal table through psycopg, and a commit."""

    name = "plain psycopg"
    needs = ("psycopg",)
    table = "plain"
    finished = "SELECT count(*) FROM plain"
    statement = "INSERT INTO plain (data) VALUES (%s)"

    def prepare(self) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("CREATE TABLE plain (id bigserial PRIMARY KEY, data jsonb NOT NULL)")

    async def connect(self) -> None:
        self.connection = psycopg.connect(self.url, autocommit=True)

    async def add(self, number: int) -> None:
        self.connection.execute(self.statement, (Jsonb(document(number)),), prepare=True)

    async def close(self) -> None:
        self.connection.close()


class Notifying(Plain):
    """The same with a pg_notify in the transaction, as most queues do."""

    name = "psycopg + NOTIFY"
    statement = f"WITH added AS ({Plain.statement} RETURNING id) SELECT pg_notify('plain', '') FROM added"


class Loop(Orm):
    """A loop that opens a session, executes the processor's insert, and commits."""

    name = "plain loop"
    finished = "SELECT count(*) FROM effects"

    def prepare(self) -> None:
        """Create nothing, because the loop writes only to the table of effects."""

    async def add(self, number: int) -> None:
        with Session(self.engine) as session:
            session.execute(_EFFECT, {"n": number})
            session.commit()


_EFFECT = sa.text("INSERT INTO effects (n) VALUES (:n)")


def time_adds(engine: sa.Engine, add: Any, count: int) -> list[float]:
    """Return the seconds that each `add` takes in a transaction that also reads and writes other rows."""
    took = []
    for number in range(count):
        with Session(engine) as session:
            session.execute(_EFFECT, {"n": number})
            session.execute(sa.text("SELECT n FROM effects WHERE n = :n"), {"n": number}).all()
            begun = time.perf_counter()
            add(session, number)
            took.append(time.perf_counter() - begun)
            session.commit()
    return took
