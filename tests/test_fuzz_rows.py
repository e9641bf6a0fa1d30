"""Whatever anybody writes into apoq's tables past this library: workers go on, and people can look.

Random rows of every column, each type's extremes among them, stand beside innocent tasks, which a real
worker has to do in time. If they aren't done, the rows are tried one by one, and the failure
names those that are the cause.

`python -m pytest --hypothesis-profile thorough tests/test_fuzz_rows.py` draws thousands, each time others.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import probe
import pytest
import sqlalchemy as sa
import sqlalchemy.exc
from click.testing import CliRunner
from drawn import drawn
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from apoq import Cancel, Queue, Retry, Snooze, Task, Worker
from apoq.cli import main
from apoq.core.states import STATES
from apoq.postgres.connections import own_engine

# The threads of a worker take their jitter from it, while Hypothesis makes the next example.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies"),
    pytest.mark.slow,
]

PATIENCE = 6.0
"""Seconds in which innocent tasks have to be done: on an idle machine they take a hundredth."""

QUEUES = (Queue(), Queue("other"))

Row = dict[str, str | None]
"""The values of some columns, as PostgreSQL reads them from text."""


def fuzz(examples: int) -> settings:
    # A row that fails is found by trying row by row, in much less time.
    return drawn(examples, phases=[Phase.explicit, Phase.generate])


# What is written.

LARGE = {
    "large: text": "k" * 1_000_000,
    "large: characters": '"' + "💖" * 300_000 + '"',
    "large: string": '"' + "a" * 1_000_000 + '"',
    "large: array": "[" + ",".join(["0"] * 300_000) + "]",
    "large: depth of arrays": "[" * 3_000 + "]" * 3_000,
    "large: depth of objects": '{"a":' * 3_000 + "1" + "}" * 3_000,
    "large: number": "9" * 5_000,
    "large: ids": f"{{{','.join(map(str, range(50_000)))}}}",
}
"""By names, or else nobody could read which rows failed."""


def integers(bits: int) -> st.SearchStrategy[str]:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    edges = [low, low + 1, low + 2, -1, 0, 1, 2, high - 2, high - 1, high]
    return st.one_of(st.sampled_from(edges), st.integers(low, high)).map(str)


bigints, ints, smallints = integers(64), integers(32), integers(16)

times = st.one_of(
    st.sampled_from(
        [
            "infinity",
            "-infinity",
            "4714-11-24 00:00:00+00 BC",
            "4714-11-24 00:00:00.000001+00 BC",
            "4714-11-24 00:00:01+00 BC",
            "4713-01-01 00:00:00+00 BC",
            "0044-03-15 00:00:00+00 BC",
            "0001-12-31 23:59:59.999999+00 BC",
            "0001-01-01 00:00:00+00",
            "1969-12-31 23:59:59.999999+00",
            "epoch",
            "now",
            "9999-12-31 23:59:59.999999+00",
            "10000-01-01 00:00:00+00",
            "294276-12-31 23:59:59.999999+00",
        ]
    ),
    st.builds(
        "J{} {:02}:{:02}:{:02}.{:06}+00".format,  # a Julian day: the whole range
        st.integers(0, 109_203_527),
        st.integers(0, 23),
        st.integers(0, 59),
        st.integers(0, 59),
        st.integers(0, 999_999),
    ),
)
past = st.one_of(times, st.sampled_from(["now", "epoch", "yesterday", "-infinity", "0044-03-15 00:00+00 BC"]))

intervals = st.one_of(
    st.sampled_from(
        [
            "infinity",
            "-infinity",
            "178000000 years",
            "-178000000 years",
            "5000000 years",
            "-5000000 years",
            "2147483647 months",
            "-2147483648 months",
            "2147483647 days",
            "-2147483648 days",
            "9223372036854775807 microseconds",
            "-9223372036854775808 microseconds",
            "999999999 days 24:00:00",
            "1 month -30 days",
            "1 microsecond",
            "-1 microsecond",
            "0",
            "100 years",
            "101 years",
        ]
    ),
    st.builds(
        "{} months {} days {} microseconds".format,
        st.integers(-(2**31), 2**31 - 1),
        st.integers(-(2**31), 2**31 - 1),
        st.integers(-(2**63), 2**63 - 1),
    ),
)

characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
texts = st.one_of(
    st.text(characters, max_size=20),
    st.sampled_from(
        [
            "",
            " ",
            "default",
            "other",
            "\\",
            "\\.",
            "\\N",
            "NULL",
            '{"a",b}',
            "%s%(id)s%%",
            ":x $1 ?",
            "'; DROP TABLE apoq_tasks; --",
            "\x01\x1b[2J\x1b]0;x\x07\x9b2J\u202e\u2028",
            "a\nb\rc\td",
            "💖" * 300,
            "[red]rich[/red] [link=x]",
            "x" * 500,
            "large: text",
        ]
    ),
)

json_texts = st.one_of(
    st.recursive(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-(10**30), 10**30),
            st.floats(allow_nan=False, allow_infinity=False),
            st.text(characters, max_size=10),
        ),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(st.text(characters, max_size=5), inner, max_size=4)
        ),
        max_leaves=10,
    ).map(json.dumps),
    st.sampled_from(
        [
            "null",
            "[]",
            '""',
            '"\\ud83d\\ude00"',
            '{"": {"": []}}',
            '{"a": 1, "a": 2}',
            "1e100000",
            "-1e100000",
            "1e-16000",
            "large: number",
            '{"a": ' + "9" * 400 + ".5}",
            "large: depth of arrays",
            "large: depth of objects",
            "large: array",
            "large: string",
            "large: characters",
            '{"class": 1, "message": [], "traceback": {}}',
            '{"class": "\\u001b[2J", "message": "\\n\\n", "traceback": "[red]"}',
            "[[[]], {}]",
        ]
    ),
)

NOBODY = "00000000-0000-0000-0000-000000000000"
OWN = "own"
"""Stands for the id of the worker that runs."""

uuids = st.one_of(st.sampled_from([NOBODY, OWN, OWN, str(UUID(int=2**128 - 1))]), st.uuids().map(str))

TYPES = ("t", "t", "t", "fails", "retries", "snoozes", "cancels", "writes", "awaits", "nobody's")

columns: dict[str, st.SearchStrategy[str | None]] = {
    "id": bigints.filter(lambda id_: not 0 <= int(id_) < 10**9),  # the sequence's own are for the others
    "created_at": times,
    "process_at": past,
    "completed_at": times | st.none(),
    "data": json_texts,
    "state": st.sampled_from(["pending"] * 12 + ["running"] * 6 + list(STATES)),
    "fail_count": ints,
    "queue": st.one_of(st.sampled_from(["default", "other"]), st.sampled_from(["default", "other"]), texts),
    "priority": smallints,
    "retry_limit": ints | st.none(),
    "retry_delay": intervals | st.none(),
    "timeout": intervals | st.none(),
    "attempt": ints,
    "rescue_count": ints,
    "claim_token": bigints,
    "worker_id": uuids | st.none(),
    "claimed_at": times | st.none(),
    "prefetched": st.sampled_from(["t", "f"]),
    "failed_at": times | st.none(),
    "cancelled_at": times | st.none(),
    "error": json_texts | st.none(),
}
NOTED = "noted"
"""Not a column: whether the row is in apoq_claims, too."""


@st.composite
def rows(draw: st.DrawFn) -> Row:
    """Make a row of a few columns that aren't as usual, or of many."""
    chosen = draw(
        st.one_of(
            st.sets(st.sampled_from(list(columns)), min_size=1, max_size=3),
            st.sets(st.sampled_from(list(columns)), max_size=len(columns)),
        )
    )
    row: Row = {"type": draw(st.one_of(*[st.sampled_from(TYPES)] * 9, texts))}
    for name, values in columns.items():  # in their order, or else two runs aren't alike
        if name in chosen:
            row[name] = draw(values)
    if row.get("state") == "running" and draw(st.booleans()):
        row[NOTED] = "t"
    return row


arrays = st.lists(bigints | st.just("NULL"), max_size=5)
task_ids = st.one_of(
    arrays.map(lambda ids: f"{{{','.join(ids)}}}"),
    st.lists(bigints, min_size=2, max_size=2).map(lambda ids: f"{{{{{ids[0]}}},{{{ids[1]}}}}}"),
    st.sampled_from(["{}", "{NULL}", "[-5:-4]={1,2}", "large: ids"]),
)
claim_rows = st.fixed_dictionaries(
    {"worker_id": uuids, "number": bigints | st.integers(0, 999).map(str), "task_ids": task_ids}
)

names = st.one_of(
    st.sampled_from(
        ["{}", "{NULL}", "{default}", "{default,other}", "{{a,b},{c,d}}", "[-1:0]={a,b}", '{""}']
    ),
    st.lists(st.text(st.characters(categories=["L"]), min_size=1, max_size=5), max_size=3).map(
        lambda found: f"{{{','.join(json.dumps(name, ensure_ascii=False) for name in found)}}}"
    ),
)
worker_rows = st.fixed_dictionaries(
    {
        "id": st.uuids().map(str) | st.just(NOBODY),
        "host": texts,
        "pid": ints,
        "version": texts,
        "queues": names,
        "concurrency": ints,
    },
    optional={
        "started_at": times,
        "last_heartbeat_at": times,
        "backend_pid": ints | st.none(),
        "backend_start": times | st.none(),
    },
)


# Where it is written.


@pytest.fixture(scope="module")
def engine(template, create_database, drop_database) -> Iterator[sa.Engine]:
    url = create_database(template.database)
    engine = sa.create_engine(url)
    yield engine
    engine.dispose()
    drop_database(url)


def write(connection: sa.Connection, table: str, row: Row, own: UUID | None) -> int | None:
    """Insert a row, if the server takes it; return its id."""
    values = {
        name: str(own or NOBODY) if value == OWN else LARGE.get(value, value)
        for name, value in row.items()
        if name != NOTED
    }
    casts = {name: _cast(table, name) for name in values}
    statement = sa.text(
        f"INSERT INTO {table} ({', '.join(values)}) "
        f"VALUES ({', '.join(f'CAST(:{name} AS {casts[name]})' for name in values)}) "
        f"RETURNING {'id' if table == 'apoq_tasks' else '0'}"
    )
    try:
        with connection.begin_nested():
            id_ = connection.scalar(statement, values)
            if row.get(NOTED):
                connection.execute(
                    sa.text("INSERT INTO apoq_claims VALUES (:worker_id, :number, ARRAY[:id]::bigint[])"),
                    {"worker_id": values.get("worker_id") or NOBODY, "number": -abs(id_ % 2**62), "id": id_},
                )
            return id_
    except sqlalchemy.exc.DBAPIError:
        return None


_TYPES = {
    "apoq_tasks": {
        **dict.fromkeys(("id", "claim_token"), "bigint"),
        **dict.fromkeys(("fail_count", "retry_limit", "attempt", "rescue_count"), "int"),
        **dict.fromkeys(("data", "error"), "jsonb"),
        **dict.fromkeys(("retry_delay", "timeout"), "interval"),
        "priority": "smallint",
        "worker_id": "uuid",
        "prefetched": "boolean",
    },
    "apoq_claims": {"worker_id": "uuid", "number": "bigint", "task_ids": "bigint[]"},
    "apoq_workers": {
        "id": "uuid",
        **dict.fromkeys(("pid", "concurrency", "backend_pid"), "int"),
        "queues": "text[]",
        "backend_start": "timestamptz",
    },
}


def _cast(table: str, name: str) -> str:
    return _TYPES[table].get(name, "timestamptz" if name.endswith("_at") else "text")


def empty(engine: sa.Engine, but: UUID | None = None) -> None:
    """Delete everything, but for what a worker that runs has written about itself."""
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM apoq_tasks")
        for table, column in (("apoq_claims", "worker_id"), ("apoq_workers", "id")):
            statement = sa.text(f"DELETE FROM {table} WHERE {column} IS DISTINCT FROM :but")
            connection.execute(statement, {"but": but})


# Who works on it.


def nothing(task):
    """Complete."""


def fail(task):
    raise ValueError("no")


def retry(task):
    raise Retry("later", delay=0)


def snooze(task):
    raise Snooze(3600)


def cancel(task):
    raise Cancel("no")


def record(task):
    task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})


async def coroutine(task):
    """Complete, asynchronously."""


PROCESSORS = {
    "t": nothing,
    "fails": fail,
    "retries": retry,
    "snoozes": snooze,
    "cancels": cancel,
    "writes": record,
    "awaits": coroutine,
    "innocent": nothing,
}


def make_worker(engine: sa.Engine, **options: Any) -> Worker:
    """Make a worker of all these types, to whose events somebody listens."""
    worker = Worker(engine, *QUEUES, **options)
    for type_, processor in PROCESSORS.items():
        worker.use(type_, processor, retry_limit=1, retry_delay=lambda _: 3600)
    for name in ("task.completed", "task.failed", "task.retried"):
        worker.events.on(name, lambda task, *error: repr((task.id, task.retry_delay, task.timeout)))
    return worker


class Complaints(logging.Handler):
    """Keeps what the log says of a worker that doesn't get on."""

    SAYINGS = re.compile(r"apoq-\w+ failed|died|database is away|raised|refused the result")

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if self.SAYINGS.search(message := record.getMessage()):
            self.heard.append(message[:300])


@pytest.fixture(scope="module")
def complaints() -> Iterator[Complaints]:
    logger, handler = logging.getLogger("apoq"), Complaints()
    logger.addHandler(handler)
    logger.propagate = False  # tasks fail here by the thousand
    yield handler
    logger.propagate = True
    logger.removeHandler(handler)


class Works:
    """One worker for many examples; after one that it didn't get over, another."""

    def __init__(self, engine: sa.Engine, complaints: Complaints) -> None:
        self._engine = engine
        self._complaints = complaints
        self._worker: Worker | None = None

    @property
    def own(self) -> UUID | None:
        """The id of the worker, as it stands in the tables."""
        return self._worker and probe.worker_id(self._worker)

    def stop(self) -> None:
        if self._worker is not None:
            self._worker.stop(timeout=5)
            self._worker = None

    def begin_again(self) -> None:
        self.stop()
        empty(self._engine)

    def takes(self, table: str, given_rows: list[Row]) -> list[str]:
        """Write these rows, with innocent tasks around them; return what went wrong."""
        if self._worker is None:
            self._worker = make_worker(self._engine)
            self._worker.start()
        self._complaints.heard.clear()
        ids = write_all(self._engine, table, given_rows, self.own)
        if late := undone(self._engine, ids):
            return [late, *self._complaints.heard]
        return [*self._complaints.heard] + ([] if self._worker.is_healthy() else ["it isn't healthy"])

    def check(self, table: str, given_rows: list[Row]) -> None:
        """See that these rows hold nobody up; if they do, name those that do so by themselves."""
        faults = self.takes(table, given_rows)
        if not faults:
            empty(self._engine, but=self.own)
            return
        found = []
        for row in given_rows:
            self.begin_again()
            if its := self.takes(table, [row]):
                found.append(f"{row}: {'; '.join(its)}")
            if len(found) == ENOUGH:
                break
        self.begin_again()
        rows_ = ", ".join(map(repr, given_rows))
        raise AssertionError("\n".join(found or [f"none of these by itself: {'; '.join(faults)}: {rows_}"]))


ENOUGH = 2
"""Rows that are named, at most: each costs all the patience that there is."""


def write_all(engine: sa.Engine, table: str, given_rows: list[Row], own: UUID | None) -> list[int]:
    """Write rows, and innocent tasks before and after them; return the ids of these."""
    innocents = []
    with Session(engine) as session, session.begin():
        innocents += [QUEUES[0].add(session, "innocent", {}) for _ in range(2)]
        for row in given_rows:
            write(session.connection(), table, row, own)
        innocents += [queue.add(session, "innocent", {}) for queue in QUEUES for _ in range(2)]
        return [task.id for task in innocents]


def undone(engine: sa.Engine, ids: list[int]) -> str:
    """Wait until tasks have completed; say how many haven't, if any."""
    statement = sa.text("SELECT count(*) FROM apoq_tasks WHERE id = ANY (:ids) AND state <> 'completed'")
    deadline = time.monotonic() + PATIENCE
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while left := connection.scalar(statement, {"ids": ids}):
            if time.monotonic() > deadline:
                return f"{left} of {len(ids)} other tasks aren't done after {PATIENCE:g} s"
            time.sleep(0.002)
    return ""


@pytest.fixture(scope="module")
def works(engine, complaints) -> Iterator[Works]:
    works = Works(engine, complaints)
    yield works
    works.stop()


@fuzz(40)
@given(given_rows=st.lists(rows(), min_size=5, max_size=15))
def test_no_task_holds_up_the_others(works, given_rows):
    works.check("apoq_tasks", given_rows)


@fuzz(20)
@given(given_rows=st.lists(claim_rows, min_size=1, max_size=8))
def test_no_note_of_a_claim_holds_up_tasks(works, given_rows):
    works.check("apoq_claims", given_rows)


def test_nothing_is_left_after_the_stop(engine, works):
    works.takes("apoq_tasks", [])
    before = works.own
    works.stop()

    # The one that was forged in its name is another's to rescue.
    worker = Worker(engine)
    worker.start()
    worker.stop()

    with engine.connect() as connection:
        left = connection.execute(sa.text("SELECT worker_id, number FROM apoq_claims")).all()
    assert (before is None, left) == (False, [])


@fuzz(8)
@given(given_rows=st.lists(rows(), min_size=3, max_size=8))
def test_no_task_makes_work_raise(engine, works, given_rows):
    works.begin_again()
    worker = make_worker(engine)
    # Those that are tried again at once, for ever, would be all that one thread gets to.
    given_rows = [
        row if row["type"] not in {"fails", "retries"} else row | {"type": "t"} for row in given_rows
    ]
    ids = write_all(engine, "apoq_tasks", given_rows, None)
    probe.lifecycle(worker).acquire()  # so that each call doesn't find new connections
    try:
        for _ in range(len(given_rows) + 2 * len(ids)):
            try:
                worker.work()
            except Exception as error:
                raise AssertionError(f"one of {', '.join(map(repr, given_rows))}") from error
        with engine.connect() as connection:
            statement = sa.text(
                "SELECT count(*) FROM apoq_tasks WHERE id = ANY (:ids) AND state <> 'completed'"
            )
            assert connection.scalar(statement, {"ids": ids}) == 0, ", ".join(map(repr, given_rows))
    finally:
        probe.lifecycle(worker).release()
        empty(engine)


LEASE = timedelta(seconds=3)

SEEN: Row = {"id": NOBODY, "host": "h", "pid": "1", "version": "1", "queues": "{}", "concurrency": "1"}
"""A worker, without when it was seen."""


def rescues(engine: sa.Engine, given_rows: list[Row]) -> str:
    """Write rows of workers, and a task that a dead one held; say what went wrong with a new worker."""
    empty(engine)
    orphan: Row = {"type": "innocent", "state": "running", "worker_id": str(uuid4()), NOTED: "t"}
    with engine.begin() as connection:
        for row in given_rows:
            write(connection, "apoq_workers", row, None)
        orphans_id = write(connection, "apoq_tasks", orphan, None)
    assert orphans_id is not None
    worker = make_worker(engine, lease=LEASE)
    try:
        worker.start()
        late = undone(engine, [*write_all(engine, "apoq_tasks", [], None), orphans_id])
    finally:
        worker.stop(timeout=5)
    with engine.connect() as connection:
        left = connection.scalar(sa.text("SELECT count(*) FROM apoq_claims"))
    return late or (f"{left} notes of claims are left" if left else "")


@fuzz(8)
@given(given_rows=st.lists(worker_rows, min_size=1, max_size=6))
@example(given_rows=[SEEN | {"last_heartbeat_at": "294276-12-31 23:59:59.999999+00"}])
@example(given_rows=[SEEN | {"last_heartbeat_at": "infinity"}])
@example(given_rows=[SEEN | {"last_heartbeat_at": "-infinity"}])
def test_no_row_of_a_worker_keeps_the_tasks_of_dead_ones(engine, works, given_rows):
    works.begin_again()

    if fault := rescues(engine, given_rows):
        found = [f"{row}: {its}" for row in given_rows if (its := rescues(engine, [row]))]
        raise AssertionError("\n".join(found or [f"none of these by itself: {fault}: {given_rows}"]))


# Who looks at it.


@pytest.fixture(scope="module")
def reader(engine) -> Iterator[sa.Engine]:
    """An engine as those that apoq makes for itself."""
    reader = own_engine(engine)
    yield reader
    reader.dispose()


@fuzz(15)
@given(given_rows=st.lists(rows(), min_size=1, max_size=10))
def test_every_row_can_be_read(engine, works, reader, given_rows):
    works.begin_again()
    with engine.begin() as connection:
        ids = [write(connection, "apoq_tasks", row, None) for row in given_rows]

    with Session(reader) as session:
        for row, id_ in zip(given_rows, ids, strict=True):
            if id_ is not None:
                try:
                    assert session.get_one(Task, id_).id == id_
                except Exception as error:
                    raise AssertionError(repr(row)) from error


def strict(text: str) -> Any:
    """Read JSON that is JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@fuzz(3)
@given(
    given_rows=st.lists(rows(), min_size=3, max_size=10),
    worker_rows_=st.lists(worker_rows, max_size=3),
    claim_rows_=st.lists(claim_rows, max_size=3),
)
@example(
    given_rows=[
        {"type": "t", "id": "9223372036854775807"},
        {"type": "t", "process_at": "-infinity", "state": "failed"},
        {"type": "t", "process_at": "-infinity"},
        {"type": "t", "process_at": "infinity"},
        {"type": "t", "state": "completed", "completed_at": "infinity"},
        {"type": "t", "state": "completed"},
    ],
    worker_rows_=[
        SEEN | {"last_heartbeat_at": "-infinity", "queues": "{NULL}"},
        SEEN | {"id": str(UUID(int=1)), "last_heartbeat_at": "infinity", "started_at": "infinity"},
    ],
    claim_rows_=[],
)
def test_people_can_look_at_every_row(engine, works, given_rows, worker_rows_, claim_rows_):
    works.begin_again()
    ids = []
    with engine.begin() as connection:
        for table, its in (("apoq_workers", worker_rows_), ("apoq_claims", claim_rows_)):
            for row in its:
                write(connection, table, row, None)
        ids = [write(connection, "apoq_tasks", row, None) for row in given_rows]
    url = engine.url.render_as_string(hide_password=False)

    def run(*words: str, codes: tuple[int, ...] = (0,)) -> str:
        result = CliRunner().invoke(main, words, env={"APOQ_DATABASE_URL": url})
        about = f"apoq {' '.join(words)}: {', '.join(map(repr, [*given_rows, *worker_rows_, *claim_rows_]))}"
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise AssertionError(about) from result.exception
        assert result.exit_code in codes, f"{about}\n{result.output}"
        return result.stdout

    listed = [strict(line) for line in run("list", "--json", "--limit", "100").strip().split("\n") if line]
    assert {task["id"] for task in listed} == {id_ for id_ in ids if id_ is not None}
    run("list", "--limit", "100")
    for state in STATES:
        run("list", "--state", state, "--limit", "100")
    for id_ in ids:
        if id_ is not None:
            assert strict(run("show", "--json", "--", str(id_)))["id"] == id_
            run("show", "--", str(id_))
    strict(run("stats", "--json"))
    run("stats", "--types")
    # What it finds fault with is rightly so.
    strict(run("doctor", "--json", codes=(0, 1)))
    run("doctor", codes=(0, 1))
