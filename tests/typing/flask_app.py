"""apoq.flask, as a user's type checker sees it."""

from __future__ import annotations

from datetime import timedelta
from typing import assert_type

import flask_sqlalchemy_lite
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from apoq import Queue, RunningTask, Task
from apoq.flask import Apoq

db = SQLAlchemy()
lite = flask_sqlalchemy_lite.SQLAlchemy()
apoq = Apoq()
Apoq(Flask(__name__), Queue("emails"), session=scoped_session(sessionmaker()))


@apoq.task
def send_welcome(task: RunningTask, user_id: int, *, locale: str = "en") -> None: ...


@apoq.task(retry_limit=3)
async def double(number: int) -> int:
    return 2 * number


@apoq.processor("resize", retry_limit=3)
def resize(task: RunningTask) -> None: ...


async def right(session: Session, async_session: AsyncSession) -> None:
    assert_type(send_welcome.add(7), Task)
    assert_type(send_welcome.add(user_id=7, locale="de"), Task)
    assert_type(send_welcome.add(session, user_id=7), Task)
    assert_type(send_welcome.add(db.session, 7), Task)
    assert_type(send_welcome.add(lite.session, 7), Task)
    assert_type(await send_welcome.add(async_session, user_id=7), Task)
    assert_type(send_welcome.using(delay=timedelta(hours=1)).add(user_id=7), Task)
    assert_type(send_welcome.add_many([send_welcome.call(7)]), int)
    assert_type(send_welcome.add_many(session, [send_welcome.call(7)]), int)
    assert_type(await double(4), int)
    assert_type(apoq.add("t", {"n": 1}, priority=3), Task)
    assert_type(apoq.add("t", session=db.session), Task)
    assert_type(await apoq.add("t", session=async_session), Task)
    assert_type(apoq.add_many("t", [1, 2]), int)
    assert_type(Queue().add(db.session, "t"), Task)
    assert_type(apoq.is_healthy(), bool)


def wrong(session: Session) -> None:
    send_welcome.add("7")  # wrong: call-overload reportArgumentType
    send_welcome.add(session)  # wrong: call-overload reportArgumentType
    send_welcome.add()  # wrong: call-overload reportCallIssue
    send_welcome.add(7, language="de")  # wrong: call-overload reportCallIssue
    send_welcome.using(dely=3)  # wrong: call-arg reportCallIssue
    apoq.add("t", prority=3)  # wrong: call-overload reportCallIssue
    apoq.use("t", resize, retries=3)  # wrong: call-arg reportCallIssue
