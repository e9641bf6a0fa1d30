"""The code in docs/coming-from.md adds tasks that run."""

from __future__ import annotations

import asyncio

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from apoq import Task, Worker


def test_what_it_adds_is_run(engine, run_page):
    page = run_page("coming-from.md")

    async def request_report() -> None:
        async_engine = create_async_engine(engine.url)
        async with AsyncSession(async_engine) as session, session.begin():
            await page["request_report"](session, 7)
        await async_engine.dispose()

    asyncio.run(request_report())
    with Session(engine) as session, session.begin():
        page["pay"](session, 7)
        page["upload"](session, 7)
        page["push_later"](session, 7)
        assert session.scalars(sa.select(Task.type).where(Task.process_at > sa.func.now())).all() == [
            "make_report",
            "push",
        ]
        session.execute(sa.update(Task).values(process_at=sa.func.now()))

    worker = Worker(engine, page["queue"], page["reports"])
    while worker.work() is not None:
        pass

    with Session(engine) as session:
        ended = session.execute(sa.select(Task.type, Task.state).order_by(Task.type)).all()
    assert [tuple(row) for row in ended] == [
        (type_, "completed") for type_ in ("make_report", "push", "resize", "send_receipt")
    ]
