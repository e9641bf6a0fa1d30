"""A site on which people upload a file of orders, and watch how it is imported."""

import csv
import io
import os
import smtplib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from flask import Blueprint, Flask, current_app, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import JSON, BigInteger, ForeignKey, Numeric, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from apoq import Fail, Limit, RunningTask, Task, database_url
from apoq.flask import Apoq
from apoq.migrations import include_object

BATCH_SIZE = 50
COLUMNS = ("customer", "item", "quantity", "price")
LONGEST_NAME = 100
HIGHEST = 1_000_000


class Base(DeclarativeBase):
    pass


db = SQLAlchemy(model_class=Base)
migrate = Migrate(db=db, directory=str(Path(__file__).parent / "migrations"), include_object=include_object)
apoq = Apoq()
site = Blueprint("site", __name__)


class Import(Base):
    __tablename__ = "imports"

    id: Mapped[int] = mapped_column(primary_key=True)
    file_name: Mapped[str]
    content: Mapped[bytes] = mapped_column(deferred=True)
    group_id: Mapped[int | None] = mapped_column(BigInteger)
    state: Mapped[str] = mapped_column(default="running")  # then "completed" or "failed"
    rows: Mapped[int | None]  # not known before the file is split
    amount: Mapped[Decimal | None] = mapped_column(Numeric(20, 2))
    problems: Mapped[list[str]] = mapped_column(JSON, default=list)


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    import_id: Mapped[int] = mapped_column(ForeignKey("imports.id"), index=True)
    line: Mapped[int]
    customer: Mapped[str]
    item: Mapped[str]
    quantity: Mapped[int]
    price: Mapped[Decimal] = mapped_column(Numeric(10, 2))


class Customer(Base):
    __tablename__ = "customers"

    name: Mapped[str] = mapped_column(primary_key=True)
    orders: Mapped[int]
    amount: Mapped[Decimal] = mapped_column(Numeric(20, 2))


@dataclass
class Row:
    """A row of a file, not checked yet."""

    line: int
    item: str
    quantity: str
    price: str


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = database_url(os.environ["DATABASE_URL"])
    app.config["MAX_CONTENT_LENGTH"] = 20_000_000
    app.config["MAIL_TO"] = os.environ.get("MAIL_TO", "operator@example.org")
    app.config["SMTP_HOST"] = os.environ.get("SMTP_HOST", "localhost")
    app.config["SMTP_PORT"] = int(os.environ.get("SMTP_PORT", "25"))
    app.config.from_prefixed_env()  # FLASK_APOQ_CONCURRENCY=8, and so on
    db.init_app(app)
    migrate.init_app(app)
    apoq.init_app(app)
    app.register_blueprint(site)
    return app


@site.get("/")
def index() -> str:
    imports = db.session.scalars(select(Import).order_by(Import.id.desc()).limit(50))
    return render_template("index.html", imports=imports)


@site.post("/imports")
def upload() -> ResponseReturnValue:
    file = request.files["file"]
    import_ = Import(file_name=file.filename, content=file.read())
    db.session.add(import_)
    db.session.flush()  # for its id
    with apoq.queue.group(db.session, name=f"import {import_.id}") as group:
        group.add(split_file.call(import_.id))
        group.then(add_up.call(import_.id))
        group.always(report_failure.call(import_.id))
    import_.group_id = group.id
    db.session.commit()  # the import and its tasks, or neither
    return redirect(url_for("site.show", import_id=import_.id), 303)


@site.get("/imports/<int:import_id>")
def show(import_id: int) -> str:
    import_ = db.get_or_404(Import, import_id)
    done = db.session.scalar(select(func.count()).where(Order.import_id == import_id))
    return render_template("import.html", import_=import_, done=done)


@apoq.task(retry_limit=3)
def split_file(task: RunningTask, import_id: int) -> None:
    """Add a task for each batch of a customer's rows to the group of this task."""
    import_ = task.session.get_one(Import, import_id)
    rows_of: dict[str, list[Row]] = defaultdict(list)
    for customer, row in read(import_.content):
        rows_of[customer].append(row)
    import_.rows = sum(map(len, rows_of.values()))
    task.group.add_many(
        write_orders.call(import_id, customer, rows[first : first + BATCH_SIZE])
        for customer, rows in rows_of.items()
        for first in range(0, len(rows), BATCH_SIZE)
    )


# The tasks of a customer change the same row of `customers`. If they run one after the other, none holds a
# slot of a worker while it waits for the lock of that row, and a large customer leaves slots to others.
@apoq.task(retry_limit=3, limit=Limit(1, key=lambda customer, **_: customer))
def write_orders(task: RunningTask, import_id: int, customer: str, rows: list[Row]) -> None:
    """Write a batch: all of its rows exactly once, in the transaction that completes the task, or none."""
    orders, problems = [], []
    for row in rows:
        try:
            orders.append({"import_id": import_id, "customer": customer, **checked(row)})
        except ValueError as error:
            problems.append(str(error))
    if problems:  # no retries, because the file stays the same
        lines = ", ".join(str(row.line) for row in rows)
        raise Fail(f"{'; '.join(problems)}. Not imported: the orders of {customer} in the lines {lines}")
    task.session.execute(insert(Order), orders)
    new = insert(Customer).values(
        name=customer, orders=len(orders), amount=sum(order["quantity"] * order["price"] for order in orders)
    )
    sums = {"orders": Customer.orders + new.excluded.orders, "amount": Customer.amount + new.excluded.amount}
    task.session.execute(new.on_conflict_do_update(index_elements=[Customer.name], set_=sums))


@apoq.task(retry_limit=3)
def add_up(task: RunningTask, import_id: int) -> None:
    """Run when all batches are written."""
    import_ = task.session.get_one(Import, import_id)
    amount = select(func.sum(Order.quantity * Order.price)).where(Order.import_id == import_id)
    import_.amount = task.session.scalar(amount) or Decimal()
    import_.state, import_.problems = "completed", []


@apoq.task(retry_limit=3)
def report_failure(task: RunningTask, import_id: int) -> None:
    """Run when all tasks have ended, and do nothing unless some have failed."""
    if not task.count_parents().failed:
        return
    import_ = task.session.get_one(Import, import_id)
    failed = select(Task).where(Task.group_id == import_.group_id, Task.state == "failed").order_by(Task.id)
    # Kept here, because failed tasks are deleted after a week.
    import_.problems = [each.error["message"] for each in task.session.scalars(failed)]
    import_.state = "failed"
    send_mail.add(task.session, import_id)


@apoq.task(retry_limit=20)
def send_mail(task: RunningTask, import_id: int) -> None:
    import_ = task.session.get_one(Import, import_id)
    message = EmailMessage()
    message["From"], message["To"] = "imports@example.org", current_app.config["MAIL_TO"]
    message["Subject"] = f"Import {import_id} has failed"
    message["Message-ID"] = f"<import-{import_id}-failed@example.org>"  # the same if it is sent again
    message.set_content("\n\n".join([f"{import_.file_name} was not imported completely.", *import_.problems]))
    with smtplib.SMTP(current_app.config["SMTP_HOST"], current_app.config["SMTP_PORT"], timeout=30) as smtp:
        smtp.send_message(message)


def read(content: bytes) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a file with their customers."""
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), restval="")
        if not {*COLUMNS} <= {*(reader.fieldnames or ())}:
            raise Fail(f"the file must have the columns {', '.join(COLUMNS)}")
        for row in reader:
            customer, item, quantity, price = (row[column].strip() for column in COLUMNS)
            if not 0 < len(customer) <= LONGEST_NAME:
                raise Fail(f"line {reader.line_num}: the customer must have 1 to {LONGEST_NAME} characters")
            yield customer, Row(reader.line_num, item, quantity, price)
    except (UnicodeError, csv.Error) as error:
        raise Fail(f"the file must be CSV in UTF-8: {error}") from None


def checked(row: Row) -> dict[str, Any]:
    """Return a row as it is stored; ValueError if it is wrong."""
    try:
        quantity, price = int(row.quantity), round(Decimal(row.price), 2)
        if 0 < quantity <= HIGHEST and 0 <= price <= HIGHEST:
            return {"line": row.line, "item": row.item, "quantity": quantity, "price": price}
    except (ValueError, ArithmeticError):
        pass
    raise ValueError(
        f"line {row.line}: quantity and price must be numbers up to {HIGHEST:,}, got {row.quantity!r} and "
        f"{row.price!r}"
    )
