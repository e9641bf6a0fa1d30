"""Typed tasks: an order is placed, and a function receives it as a dataclass and sends the receipt.

Runs on DATABASE_URL, or else on a private PostgreSQL of its own:

    python examples/typed_tasks.py
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from uuid import UUID, uuid4

from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from apoq import InvalidTask, Queue, RunningTask, Worker, prepare
from apoq.embedded import database

queue = Queue()


@dataclass
class Order:
    id: UUID
    placed_at: datetime
    total: Decimal


@queue.task(retry_limit=3, timeout=timedelta(seconds=30))
def send_receipt(order: Order, *, locale: str = "en") -> None:
    print(f"📧 a receipt over {order.total:.2f} € ({locale}), {order.placed_at:%d %B %Y}")


@queue.task
def remind(task: RunningTask, order_id: UUID) -> None:
    print(f"⏰ attempt {task.attempt} to remind of {order_id}")


def main(url: str) -> None:
    engine = create_engine(url)
    prepare(engine)
    order = Order(uuid4(), datetime.now(UTC), Decimal("19.90"))

    with Session(engine) as session, session.begin():
        # The arguments are checked against the function's signature, by your type checker and at runtime.
        task = send_receipt.add(session, order, locale="fr")
        print(f"task {task.id} is {task.type} with {task.data}")
        remind.using(priority=10).add(session, order_id=order.id)
        try:
            send_receipt.add(session, order, language="fr")  # type: ignore[call-overload]
        except InvalidTask as error:
            print(f"refused: {error}")

    # A worker of the queue runs its typed tasks.
    worker = Worker(engine, queue)
    while done := worker.work():
        print(f"✨ {done.type} {done.state}")

    send_receipt(order)  # still calls the function
    engine.dispose()


if __name__ == "__main__":
    with database() as url:
        main(url)
