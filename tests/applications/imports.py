"""What the tests of the import example share: its site, the calls of its workers, and the facts about it."""

from __future__ import annotations

import json
import re
import runpy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_string
from email.policy import default
from itertools import pairwise
from typing import NamedTuple

import httpx
import sqlalchemy as sa
from applications.harness import ROOT, Application, Example, Mailbox, Process, Site, until

EXAMPLE = Example(
    folder="import_app",
    extras="binary,embedded,flask",
    migrate=["flask", "db", "upgrade"],
    web=["gunicorn", "--bind", "127.0.0.1:{port}", "--workers", "2", "app:create_app()"],
    worker=["flask", "--app", "watched:create_app", "apoq", "worker"],
)

LARGEST = "Customer 1"
"""The customer with the most rows, in several batches."""

MAIL_TO = "operator@example.org"

WATCHED = '''
"""The application, whose tasks write down when their functions begin and end."""

import json
import os
import time

import app
from app import create_app

calls = os.open("calls.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def watched(typed_task):
    function = typed_task.function

    def call(task, **arguments):
        def note(what):
            seen = {"what": what, "at": time.monotonic(), "id": task.id, "token": task.claim_token}
            seen |= {"type": task.type, "import": arguments["import_id"]}
            seen |= {"customer": arguments.get("customer")}
            os.write(calls, (json.dumps(seen) + "\\n").encode())

        note("begin")
        try:
            function(task, **arguments)
        finally:
            note("end")

    typed_task.function = call


for each in (app.split_file, app.write_orders, app.add_up, app.report_failure, app.send_mail):
    watched(each)
'''


class Call(NamedTuple):
    """A call of a task's function."""

    import_id: int
    type: str
    id: int
    token: int
    """Of its claim."""
    customer: str | None
    begin: float
    """By time.monotonic(), which is the same clock in all processes."""
    end: float | None
    """None if the worker was killed before."""


class Calls:
    """The calls of the functions in all workers of an application."""

    def __init__(self, application: Application) -> None:
        (application.folder / "watched.py").write_text(WATCHED)
        self._file = application.folder / "calls.jsonl"
        self._file.touch()

    def read(self, import_id: int) -> list[Call]:
        begun: dict[tuple[int, int], Call] = {}
        for line in self._file.read_text().splitlines():
            seen = json.loads(line)
            key = seen["id"], seen["token"]
            if seen["what"] == "begin":
                assert key not in begun, f"the claim {key} was run twice"
                names = ("import", "type", "id", "token", "customer", "at")
                begun[key] = Call(*(seen[name] for name in names), end=None)
            else:
                begun[key] = begun[key]._replace(end=seen["at"])
        return [call for call in begun.values() if call.import_id == import_id]


class Look(NamedTuple):
    """The page of an import, as a browser shows it."""

    state: str
    done: int
    total: int | None
    """None if the file has not been read yet."""
    percent: int | None
    html: str


class ImportSite:
    """The site of the application."""

    def __init__(self, site: Site) -> None:
        self._client = site.client

    def upload(self, content: str, name: str = "orders.csv") -> int:
        """Upload a file as the form does; return the id of its import."""
        response = self._client.post("/imports", files={"file": (name, content, "text/csv")})
        assert response.status_code == httpx.codes.SEE_OTHER, response.text
        return int(response.headers["location"].rpartition("/")[2])

    def look(self, import_id: int) -> Look:
        response = self._client.get(f"/imports/{import_id}")
        assert response.status_code == httpx.codes.OK, response.text
        html = response.text
        (state,) = re.findall(r'id="state".*?<span class="(\w+)">\1</span>', html)
        bar = re.search(r'<progress [^>]*value="(\d+)" max="(\d+)"', html)
        if bar is None:
            return Look(state, 0, None, None, html)
        (percent,) = re.findall(r"rows, (\d+) %", html)
        return Look(state, int(bar[1]), int(bar[2]), int(percent), html)


@dataclass
class Imported:
    """An import, and what was seen of it."""

    id: int
    content: str
    worker: Process
    """The worker that runs its tasks: the last one, if another was killed."""
    looks: list[Look] = field(default_factory=list)
    """The page at each look, in order."""
    mails: list[str] = field(default_factory=list)
    """All mails that had arrived when all tasks had ended."""
    killed_at: float | None = None
    """When a worker was killed, by time.monotonic()."""

    @property
    def lines(self) -> list[int]:
        """The numbers of the lines that are rows."""
        return list(range(2, self.content.count("\n") + 1))


class Importing:
    """Uploads files, and waits for what happens with them."""

    def __init__(self, site: ImportSite, engine: sa.Engine, mailbox: Mailbox, calls: Calls) -> None:
        self.site, self.engine, self._mailbox, self.calls = site, engine, mailbox, calls

    def upload(self, content: str, worker: Process) -> Imported:
        return Imported(self.site.upload(content), content, worker)

    def until_rows(self, imported: Imported, count: int) -> None:
        """Look at the page until so many rows are written."""

        def has_come_so_far() -> bool:
            imported.looks.append(self.site.look(imported.id))
            return imported.looks[-1].done >= count

        until(has_come_so_far, what=f"{count} rows", alive=imported.worker)

    def until_ended(self, imported: Imported) -> None:
        """Look at the page until it says that the import has ended, and wait until all tasks have."""

        def has_ended() -> bool:
            imported.looks.append(self.site.look(imported.id))
            return imported.looks[-1].state != "running"

        until(has_ended, what="the import ends", alive=imported.worker)
        until(lambda: not self._open_tasks(), what="all tasks end", alive=imported.worker)
        imported.mails = self._mailbox.of(MAIL_TO)

    @contextmanager
    def held_customer(self, name: str) -> Iterator[None]:
        """Hold the row of a customer, so that a task which has written its orders waits for it."""
        with self.engine.connect() as connection:
            connection.execute(sa.text("INSERT INTO customers VALUES (:name, 0, 0)"), {"name": name})
            yield
            connection.rollback()

    def written_lines(self, imported: Imported) -> list[int]:
        """Return the numbers of the lines of which there are rows, one number for each row."""
        statement = sa.text("SELECT line FROM orders WHERE import_id = :id ORDER BY line, id")
        with self.engine.connect() as connection:
            return list(connection.scalars(statement, {"id": imported.id}))

    def rows(self, statement: str) -> list[tuple[object, ...]]:
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sa.text(statement))]

    def _open_tasks(self) -> int:
        statement = "SELECT count(*) FROM apoq_tasks WHERE state NOT IN ('completed', 'failed', 'cancelled')"
        with self.engine.connect() as connection:
            return connection.exec_driver_sql(statement).scalar_one()


def make_orders(count: int) -> str:
    """Return a file with so many orders."""
    rows = runpy.run_path(str(ROOT / "examples" / EXAMPLE.folder / "sample.py"))["rows"](count)
    return "customer,item,quantity,price\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)


def count_of(content: str, customer: str) -> int:
    return content.count(f"\n{customer},")


def text_of(mail: str) -> str:
    text: str = message_from_string(mail, policy=default).get_content()
    return text


def most_at_once(calls: list[Call], killed_at: float | None) -> int:
    """Return how many of these calls ran at the same moment, at most."""
    changes = [(call.begin, 1) for call in calls]
    changes += [(killed_at if call.end is None else call.end, -1) for call in calls]
    most = running = 0
    for _, change in sorted(changes):  # an end before a begin at the same moment
        running += change
        most = max(most, running)
    return most


class ImportScenario:
    """What is true of an import, whether or not a worker was killed; and of one with wrong rows.

    `imported` is an import that has completed, and `broken` one of a file with two wrong rows, after it.
    """

    def test_each_row_is_written_exactly_once(self, importing, imported):
        assert importing.written_lines(imported) == imported.lines

    def test_no_two_tasks_of_a_customer_run_at_once(self, importing, imported):
        calls = [call for call in importing.calls.read(imported.id) if call.customer]
        of_customer = defaultdict(list)
        for call in calls:
            of_customer[call.customer].append(call)

        assert len(of_customer[LARGEST]) > 1
        assert {most_at_once(each, imported.killed_at) for each in of_customer.values()} == {1}
        assert most_at_once(calls, imported.killed_at) > 1  # customers don't wait for each other

    def test_the_progress_grows_up_to_100_percent(self, imported):
        seen = [look.percent or 0 for look in imported.looks]

        assert all(before <= after for before, after in pairwise(seen))
        assert {*seen} - {0, 100}
        assert (imported.looks[-1].state, seen[-1]) == ("completed", 100)

    def test_the_last_step_has_run_once(self, importing, imported):
        last = [call for call in importing.calls.read(imported.id) if call.type.endswith(".add_up")]

        assert len(last) == 1
        assert last[0].begin > max(
            call.end or 0 for call in importing.calls.read(imported.id) if call.customer
        )

    def test_the_total_is_that_of_the_file(self, importing, imported):
        rows = [line.split(",") for line in imported.content.splitlines()[1:]]
        cents = sum(int(quantity) * round(float(price) * 100) for _, _, quantity, price in rows)

        assert f"The orders amount to {cents / 100:,.2f} €" in imported.looks[-1].html
        assert importing.rows("SELECT sum(amount) * 100 FROM imports WHERE state = 'completed'") == [(cents,)]

    def test_no_mail_was_sent(self, imported):
        assert imported.mails == []

    def test_a_file_with_wrong_rows_marks_the_import_as_failed(self, broken):
        assert broken.looks[-1].state == "failed"
        assert broken.looks[-1].done < broken.looks[-1].total

    def test_a_file_with_wrong_rows_leads_to_one_mail(self, broken):
        assert len(broken.mails) == 1
        for line in WRONG_LINES:
            assert f"line {line}: quantity and price must be numbers" in text_of(broken.mails[0])

    def test_the_mail_names_all_lines_that_are_missing(self, importing, broken):
        found = re.findall(r"in the lines ([\d, ]+)", text_of(broken.mails[0]))
        named = {int(line) for lines in found for line in lines.split(", ")}

        assert {*broken.lines} - named == {*importing.written_lines(broken)}

    def test_the_last_step_of_a_file_with_wrong_rows_does_not_run(self, importing, broken):
        types = [call.type.rpartition(".")[2] for call in importing.calls.read(broken.id)]

        assert types.count("add_up") == 0
        assert types.count("report_failure") == types.count("send_mail") == 1

    def test_a_batch_with_a_wrong_row_is_not_retried(self, importing, broken):
        ids = [call.id for call in importing.calls.read(broken.id)]

        assert len(ids) == len({*ids})


WRONG_LINES = (3, 17)


def make_broken_orders(count: int) -> str:
    """Return a file with wrong rows, which belong to different customers."""
    lines = make_orders(count).splitlines()
    customers = set()
    for number in WRONG_LINES:
        customer, item, _, price = lines[number - 1].split(",")
        customers.add(customer)
        lines[number - 1] = f"{customer},{item},many,{price}"
    assert len(customers) == len(WRONG_LINES)
    return "\n".join(lines) + "\n"
