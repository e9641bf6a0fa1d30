"""Typed tasks as a user writes them, for type checkers to accept; what they are to reject is marked.

A mark ``# wrong: <mypy's code> <pyright's rule>`` stands at each line that is to be rejected.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import partial
from typing import Any, assert_type

import psycopg
from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from apoq import AsyncRunningTask, Progress, Queue, Result, RunningTask, Schedule, Task, TypedTask, Worker

queue = Queue("emails")


class Colour(Enum):
    RED = "red"


@dataclass
class Order:
    id: int
    at: datetime


@queue.task
def send_welcome(user_id: int, *, locale: str = "en") -> str:
    return f"{user_id} {locale}"


@queue.task(retry_limit=3, retry_delay=lambda fail_count: fail_count * 2, timeout=timedelta(minutes=1))
def ship(order: Order, colour: Colour = Colour.RED) -> None: ...


@queue.task(type="call_back", aliases=["call"])
async def call_back(number: str) -> bytes:
    return number.encode()


@queue.task(unique=True, unique_until="ended", on_conflict="replace")
def reindex(doc_id: int) -> None: ...


@queue.task(unique=lambda doc_id, **_: str(doc_id))
def publish(doc_id: int) -> None: ...


@queue.task(keep_result=True, max_result_size=1_000)
def count_words(task: RunningTask, text: str) -> dict[str, int]:
    task.set_progress(1, 2.5, "half")
    task.set_progress("1")  # wrong: arg-type reportArgumentType
    return {text: 1}


def read_results(session: Session, engine: Engine) -> None:
    assert_type(count_words.result(session, 7), Result[dict[str, int]] | None)
    assert_type(count_words.wait(engine, 7, timeout=3), Result[dict[str, int]])
    assert_type(call_back.result(session, 7), Result[bytes] | None)
    assert_type(call_back.wait(engine, 7, timeout=timedelta(seconds=3)).value, bytes)
    assert_type(queue.result(session, 7), Result[Any] | None)
    assert_type(queue.wait(engine, 7, timeout=3), Result[Any])
    assert_type(queue.progress(session, 7), Progress | None)
    queue.wait(engine, 7)  # wrong: call-overload reportCallIssue
    queue.wait(session, 7, timeout=3)  # wrong: call-overload reportCallIssue


async def read_results_async(session: AsyncSession, engine: AsyncEngine) -> None:
    assert_type(await count_words.result(session, 7), Result[dict[str, int]] | None)
    assert_type(await count_words.wait(engine, 7, timeout=3), Result[dict[str, int]])
    assert_type(await call_back.result(session, 7), Result[bytes] | None)
    assert_type((await call_back.wait(engine, 7, timeout=3)).value, bytes)
    assert_type(await queue.result(session, 7), Result[Any] | None)
    assert_type(await queue.progress(session, 7), Progress | None)


def add_unique(session: Session) -> None:
    reindex.add(session, 7)
    publish.using(unique_key=None).add(session, 7)
    task = queue.add(session, "t", unique_key="k", on_conflict="skip")
    assert_type(task.is_new, bool)
    assert_type(queue.add_many(session, "t", [1], unique_key=str, debounce=5, max_wait=9), int)
    assert_type(queue.cancel(session, unique_key="k"), bool)
    queue.add(session, "t", unique_key="k", on_conflict="keep")  # wrong: call-overload reportCallIssue
    queue.add(session, "t", unique_key=7)  # wrong: call-overload reportCallIssue


@queue.task()
def tidy() -> None: ...


@queue.task
def charge(task: RunningTask, amount: int) -> bool:
    return task.attempt > amount


@queue.task(type="charge_later")
async def charge_later(task: AsyncRunningTask, amount: int) -> bool:
    return task.attempt > amount


@queue.task
def anything(payload: Any, *, to: str | None = None) -> int:
    return len(payload)


@queue.task(cron="0 9 * * MON-FRI", timezone="Europe/Berlin", catch_up="all", overlap="allow", jitter=60)
def report(task: RunningTask, day: str = "today") -> None:
    assert_type(task.tick_at, datetime | None)


@queue.task(every=timedelta(minutes=5), retry_limit=0)
async def poll() -> None: ...


greet = queue.task(type="greet")(partial(send_welcome, locale="de"))


def adding(
    session: Session,
    scoped: scoped_session[Session],
    connection: Connection,
    driver: psycopg.Connection,
    order: Order,
) -> None:
    assert_type(send_welcome.add(session, 7), Task)
    assert_type(send_welcome.add(scoped, user_id=7), Task)
    assert_type(send_welcome.add(connection, 7, locale="de"), Task)
    assert_type(send_welcome.add(driver, user_id=7, locale="de"), Task)
    ship.add(session, order)
    ship.add(session, order, colour=Colour.RED)
    call_back.add(session, "0123")
    tidy.add(session)
    charge.add(session, amount=7)
    charge_later.add(session, 7)
    anything.add(session, [1, 2], to="you")
    anything.add(session, payload=None)
    greet.add(session, 7)

    send_welcome.add(session)  # wrong: call-overload reportCallIssue
    send_welcome.add(session, "7")  # wrong: call-overload reportCallIssue
    send_welcome.add(session, 7, "de")  # wrong: call-overload reportCallIssue
    send_welcome.add(session, user_id=7, language="de")  # wrong: call-overload reportCallIssue
    send_welcome.add(user_id=7)  # wrong: call-overload reportCallIssue
    send_welcome.add("session", user_id=7)  # wrong: call-overload reportCallIssue
    ship.add(session, {"id": 7})  # wrong: call-overload reportCallIssue
    ship.add(session, order, "red")  # wrong: call-overload reportCallIssue
    tidy.add(session, 1)  # wrong: call-overload reportCallIssue
    charge.add(session)  # wrong: call-overload reportCallIssue
    charge.add(session, "7")  # wrong: call-overload reportCallIssue


def scheduling(session: Session, connection: Connection) -> None:
    report.add(session, day="tomorrow")
    assert_type(queue.schedule(session, "a", report.call(day="x"), cron="@daily"), Schedule)
    assert_type(queue.schedule(connection, "b", "t", {"a": 1}, every=60, priority=3), Schedule)
    assert_type(queue.unschedule(session, "a"), bool)
    assert_type(queue.schedules(session), list[Schedule])

    report.add(session, 7)  # wrong: call-overload reportCallIssue
    queue.schedule(session, "a", report.call(), every="5m")  # wrong: call-overload reportArgumentType
    queue.schedule(session, "a", report.call(), catch_up="last")  # wrong: call-overload reportArgumentType
    queue.schedule(session, "a")  # wrong: call-overload reportCallIssue
    queue.task(crn="@daily")  # wrong: call-overload reportCallIssue


async def scheduling_in_asyncio(session: AsyncSession) -> None:
    assert_type(await queue.schedule(session, "a", report.call(), cron="@daily"), Schedule)
    assert_type(await queue.unschedule(session, "a"), bool)
    assert_type(await queue.schedules(session), list[Schedule])


async def adding_in_asyncio(
    session: AsyncSession,
    scoped: async_scoped_session[AsyncSession],
    connection: AsyncConnection,
    driver: psycopg.AsyncConnection,
) -> None:
    coroutine: Coroutine[Any, Any, Task] = send_welcome.add(session, 7)
    assert_type(await coroutine, Task)
    assert_type(await send_welcome.add(scoped, 7), Task)
    assert_type(await call_back.add(connection, number="0123"), Task)
    assert_type(await charge_later.add(driver, 7), Task)
    assert_type(await tidy.add_many(session, [tidy.call()]), int)

    send_welcome.add(session, 7)  # wrong: unused-coroutine reportUnusedCoroutine
    print(send_welcome.add(session, 7).id)  # wrong: attr-defined reportAttributeAccessIssue
    await send_welcome.add(session, locale="de")  # wrong: call-overload reportCallIssue


def adding_many(session: Session) -> None:
    assert_type(send_welcome.add_many(session, [send_welcome.call(n) for n in range(9)]), int)
    send_welcome.add_many(session, (send_welcome.call(user_id=n, locale="de") for n in range(9)))
    charge.using(priority=1).add_many(session, [charge.call(amount=1)])

    send_welcome.call("7")  # wrong: arg-type reportArgumentType
    send_welcome.call(language="de")  # wrong: call-arg reportCallIssue
    send_welcome.add_many(session, [7, 8])  # wrong: list-item reportArgumentType
    assert_type(send_welcome.add_many(session, [{"user_id": 7}, send_welcome.call(8)]), int)
    send_welcome.to(Queue("other")).add_many(session, [{"user_id": 7}])
    send_welcome.to("other")  # wrong: arg-type reportArgumentType
    send_welcome.add_many(session, [tidy.call()])  # wrong: list-item reportArgumentType
    send_welcome.add_many(session, send_welcome.call(7))  # wrong: call-overload reportArgumentType


def options(session: Session) -> None:
    send_welcome.using(delay=timedelta(hours=1)).add(session, 7)
    send_welcome.using(process_at=datetime.now(UTC), priority=3).using(timeout=30).add(session, user_id=7)
    ship.using(retry_limit=0, retry_delay=60)

    send_welcome.using(delay=60, retry_delay=0.5, timeout=timedelta(minutes=1))
    send_welcome.using(expires_in=60, unique_key="k", throttle=timedelta(minutes=1))
    send_welcome.using(delay="60")  # wrong: arg-type reportArgumentType
    send_welcome.delay(7)  # wrong: attr-defined reportAttributeAccessIssue
    send_welcome.using(delayed=timedelta(hours=1))  # wrong: call-arg reportCallIssue
    send_welcome.using(priority=1).add(session, "7")  # wrong: call-overload reportCallIssue
    queue.task(retries=3)  # wrong: call-overload reportCallIssue
    queue.task(retry_limit="3")  # wrong: call-overload reportArgumentType
    queue.task("send_welcome")  # wrong: call-overload reportCallIssue


async def calling(running: RunningTask) -> None:
    assert_type(send_welcome(7, locale="de"), str)
    assert_type(ship(Order(7, datetime.now(UTC))), None)
    assert_type(await call_back("0123"), bytes)
    assert_type(charge(running, 7), bool)

    send_welcome("7")  # wrong: arg-type reportArgumentType
    charge(7)  # wrong: call-arg reportCallIssue
    charge(7, 7)  # wrong: arg-type reportArgumentType


def naming(engine: Engine, of_number: TypedTask[[int], object]) -> None:
    named: TypedTask[..., Any] = send_welcome
    coroutine: TypedTask[[str], Coroutine[Any, Any, bytes]] = queue.task(later)
    tasks: Mapping[str, TypedTask[..., Any]] = queue.tasks
    Worker(engine, queue)
    assert_type(named.using(priority=1).type, str)
    assert_type(coroutine.type, str)
    assert_type(tasks["call_back"].aliases, tuple[str, ...])

    naming(engine, call_back)  # wrong: arg-type reportArgumentType


async def later(number: str) -> bytes:
    return number.encode()
