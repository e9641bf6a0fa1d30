"""Exactly-once effects: four worker processes pay wages, and one of them is killed halfway.

Writes through `task.session` are committed together with the task's completion, or not at all. So although
the other workers run the tasks of the dead worker again, no one is paid twice.

Runs on DATABASE_URL, or else on a private PostgreSQL of its own:

    python examples/exactly_once.py [TASKS]
"""

import subprocess
import sys
import time
from datetime import timedelta

from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from apoq import Queue, RunningTask, Task, Worker, prepare
from apoq.embedded import database

WORKERS = 4
LEASE = timedelta(seconds=3)  # instead of the default, 15 s, so that the example ends sooner

queue = Queue("wages")


class Base(DeclarativeBase):
    pass


class Payment(Base):
    """No constraint prevents a second payment: that there is one for each task is due to apoq."""

    __tablename__ = "example_payments"

    id: Mapped[int] = mapped_column(primary_key=True)
    person: Mapped[int]


def pay(task: RunningTask) -> None:
    task.session.add(Payment(person=task.data["person"]))


def work(url: str) -> None:
    """Run one of the workers until a signal."""
    engine = create_engine(url)
    worker = Worker(engine, queue, lease=LEASE)
    worker.use("pay", pay)
    worker.run()


def main(url: str, count: int) -> bool:
    engine = create_engine(url)
    prepare(engine)
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        # Delete the tasks of an earlier run of this example.
        session.query(Task).where(Task.queue == queue.name).delete()
        queue.add_many(session, "pay", ({"person": n} for n in range(count)))

    def completed() -> int:
        with Session(engine) as session:
            states = select(func.count()).where(Task.queue == queue.name, Task.state == "completed")
            return session.scalar(states) or 0

    print(f"💸 {count:,} people to pay, {WORKERS} workers")
    began = time.perf_counter()
    command = [sys.executable, __file__, "--work", url]
    workers = [subprocess.Popen(command) for _ in range(WORKERS)]  # noqa: S603
    victim, *others = workers
    try:
        while completed() < count // 2:
            time.sleep(0.01)
        victim.kill()
        print(f"💀 killed worker {victim.pid} with {completed():,} paid")
        while completed() < count:
            time.sleep(0.05)
        took = time.perf_counter() - began
    finally:
        for each in others:
            each.terminate()
        for each in workers:
            each.wait()

    with Session(engine) as session:
        payments = session.scalar(select(func.count(Payment.id)))
        people = session.scalar(select(func.count(Payment.person.distinct())))
        again = session.scalar(select(func.count()).where(Task.queue == queue.name, Task.attempt > 1))
    engine.dispose()
    print(f"🔁 {again:,} tasks of the dead worker were run again by the others")
    print(f"✨ {payments:,} payments to {people:,} people, in {took:.1f} s: none lost, none doubled")
    return payments == people == count


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2])
    else:
        with database() as url:
            correct = main(url, int(sys.argv[1]) if sys.argv[1:] else 2_000)
        sys.exit(0 if correct else 1)
