"""An order and the task that sends its receipt: both are committed, or both are rolled back.

Runs on DATABASE_URL, or else on a private PostgreSQL of its own:

    python examples/transaction.py
"""

from sqlalchemy import ForeignKey, create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from apoq import Queue, RunningTask, Task, Worker, prepare
from apoq.embedded import database


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "example_orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]
    # A task is a mapped class like any other: a foreign key can point at it.
    receipt_id: Mapped[int | None] = mapped_column(ForeignKey(Task.id, ondelete="SET NULL"))
    receipt: Mapped[Task | None] = relationship(Task)


queue = Queue("receipts")


def place_order(session: Session, item: str) -> Order:
    order = Order(item=item)
    session.add(order)
    session.flush()
    order.receipt = queue.add(session, "send_receipt", {"order_id": order.id})
    return order


class OutOfStock(Exception):
    pass


def send_receipt(task: RunningTask) -> None:
    order = task.session.get_one(Order, task.data["order_id"])
    print(f"🧾 receipt for order {order.id}: {order.item}")


def main(url: str) -> None:
    engine = create_engine(url)
    prepare(engine)
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)

    with Session(engine) as session, session.begin():
        order = place_order(session, "a kettle")
        print(f"🛒 order {order.id} and its receipt, {order.receipt}, commit together")

    try:
        with Session(engine) as session, session.begin():
            order = place_order(session, "a unicorn")
            raise OutOfStock(order.item)
    except OutOfStock as error:
        print(f"↩️ out of stock: {error}. The order and its receipt roll back together")

    worker = Worker(engine, queue)
    worker.use("send_receipt", send_receipt)
    while worker.work():
        pass

    with Session(engine) as session:
        orders = session.execute(select(Order.item, Task.state).join(Order.receipt)).all()
    print(f"📦 in the database: {orders}")
    engine.dispose()


if __name__ == "__main__":
    with database() as url:
        main(url)
