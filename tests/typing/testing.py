"""apoq.testing as its users write it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, scoped_session

from apoq import Queue, Task, Worker
from apoq.testing import assert_enqueued, drain, enqueued, freeze, rolled_back, travel

queue = Queue()


@queue.task
def send_welcome(user_id: int) -> None: ...


def in_a_plain_test(session: Session, engine: Engine) -> None:
    found: list[Task] = enqueued(session, send_welcome, user_id=7)
    task: Task = assert_enqueued(session, "send_welcome", {"user_id": 7}, queue="emails")
    with freeze(session, datetime(2026, 1, 1, tzinfo=UTC)), travel(session, timedelta(hours=1)):
        ran: list[Task] = drain(session, queue, Worker(engine), errors="record", limit=10)
    print(found, task, ran)
    drain(session, queue, errors="ignore")  # wrong: call-overload reportCallIssue
    drain(session, "default")  # wrong: call-overload reportCallIssue
    drain(engine, queue)  # wrong: call-overload reportCallIssue
    assert_enqueued(session)  # wrong: call-overload reportCallIssue


def on_other_sessions(session: scoped_session[Session], connection: Connection, engine: Engine) -> None:
    ran: list[Task] = drain(session, queue) + drain(connection, queue)
    with rolled_back(engine) as rolled:
        ran = drain(rolled, queue)
    print(ran)


async def in_an_asyncio_test(session: AsyncSession, engine: AsyncEngine) -> None:
    found: list[Task] = await enqueued(session, send_welcome, user_id=7)
    task: Task = await assert_enqueued(session, send_welcome, user_id=7)
    async with rolled_back(engine) as rolled, travel(rolled, timedelta(hours=1)):
        ran: list[Task] = await drain(rolled, queue)
    print(found, task, ran)
    wrong: list[Task] = drain(session, queue)  # wrong: assignment reportAssignmentType
    print(wrong)
