"""The command line's half that is about tasks: add, list, show, retry, cancel, prune."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result
from sqlalchemy.orm import Session

from apoq import Queue, Task, prepare
from apoq.cli import list as listing
from apoq.cli import main, prune, selection
from apoq.schema.statements import find
from apoq.schema.tables import ClaimRow, WorkerRow
from apoq.worker.maintenance import pruner

SECRET = "s3cr3t"


@pytest.fixture(scope="module")
def module_engine(template, create_database, drop_database) -> Iterator[sa.Engine]:
    url = create_database(template.database)
    engine = sa.create_engine(url)
    yield engine
    engine.dispose()
    drop_database(url)


@pytest.fixture
def engine(module_engine) -> sa.Engine:
    """A database that is the test's alone while it runs, and emptied before."""
    with module_engine.begin() as connection:
        connection.exec_driver_sql("TRUNCATE apoq_tasks, apoq_workers, apoq_claims RESTART IDENTITY")
    return module_engine


@pytest.fixture
def run(engine, monkeypatch) -> Callable[..., Result]:
    """Call the command line on the test's database."""
    monkeypatch.setenv("APOQ_DATABASE_URL", engine.url.render_as_string(hide_password=False))

    def call(*arguments: str, stdin: str = "") -> Result:
        return CliRunner().invoke(main, arguments, input=stdin)

    return call


@pytest.fixture
def add(engine) -> Callable[..., int]:
    """Add a task in a state, with these columns."""

    def call(type_: str = "t", data: object = None, *, queue: str = "default", **columns: object) -> int:
        with Session(engine) as session, session.begin():
            task = Queue(queue).add(session, type_, {} if data is None else data)
            session.flush()
            for name, value in columns.items():
                setattr(task, name, value)
            if task.state == "running":
                session.add(ClaimRow(worker_id=uuid4(), number=0, task_ids=[task.id]))
            if task.state == "completed":
                task.completed_at = task.completed_at or task.created_at
            return task.id

    return call


def task(engine: sa.Engine, task_id: int) -> Task | None:
    with Session(engine) as session:
        return session.get(Task, task_id)


def ago(**length: float) -> datetime:
    return datetime.now(UTC) - timedelta(**length)


def has_failed() -> dict[str, object]:
    return {"state": "failed", "failed_at": ago(minutes=3), "fail_count": 1, "attempt": 1}


class TestAdd:
    def test_a_task_is_added(self, run, engine):
        done = run("add", "send", '{"user_id": 7}')

        added = task(engine, 1)
        assert done.output == "Added task 1.\n"
        assert (added.type, added.data, added.queue, added.state) == (
            "send",
            {"user_id": 7},
            "default",
            "pending",
        )

    def test_its_options_are_those_of_the_library(self, run, engine):
        options = "--queue mails --priority 5 --retry-limit 2 --retry-delay 90 --timeout 1h30m"

        done = run("add", "send", *options.split(), "--at", "2031-05-04T12:00Z")

        added = task(engine, 1)
        assert "due at 2031-05-04 12:00:00" in done.output
        assert (added.queue, added.priority, added.retry_limit) == ("mails", 5, 2)
        assert (added.retry_delay, added.timeout) == (timedelta(seconds=90), timedelta(hours=1.5))
        assert added.process_at == datetime(2031, 5, 4, 12, tzinfo=UTC)

    def test_a_delay_counts_from_now(self, run, engine):
        run("add", "send", "--delay", "1d")

        added = task(engine, 1)
        assert timedelta(hours=23) < added.process_at - added.created_at < timedelta(hours=25)

    def test_data_may_come_from_a_file_and_from_stdin(self, run, engine, tmp_path):
        (tmp_path / "data.json").write_text('{"from": "füle"}', "utf-8")

        run("add", "send", f"@{tmp_path / 'data.json'}")
        run("add", "send", "-", stdin='["stdin"]')

        assert [task(engine, n).data for n in (1, 2)] == [{"from": "füle"}, ["stdin"]]

    def test_programs_get_json(self, run):
        told = json.loads(run("add", "send", "--json").output)

        assert (told["id"], told["type"], told["queue"], told["state"]) == (1, "send", "default", "pending")

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            ('{"a": 1,}', "line 1, column 9"),
            ("{a}", "line 1, column 2: Expecting property name"),
            ('{"a":\n  nope}', "line 2, column 3"),
            ("", "must be JSON, got nothing"),
            ("@/nowhere/data.json", "'@/nowhere/data.json' can't be read: [Errno 2]"),
            ("[" * 100_000, "can't be read"),
        ],
    )
    def test_data_that_is_no_json_is_a_usage_error_that_says_where(self, run, engine, data, said):
        done = run("add", "send", data)

        assert (done.exit_code, said in done.output) == (2, True), done.output
        assert task(engine, 1) is None

    def test_a_mark_shows_the_place(self, run):
        shown = run("add", "send", '{"user_id": seven}').output.splitlines()

        assert shown[-2].index("seven") == shown[-1].index("^")

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["t", '"\\u0000"'], "jsonb can't hold U+0000"),
            (["t", "NaN"], "JSON has no nan"),
            (["", "{}"], "a task's type must not be empty"),
            (["t", "--priority", "99999"], "priority must be a whole number"),
            (["t", "--delay", "1h", "--at", "2031-05-04T12:00Z"], "can't both be given"),
            (
                ["t", "--delay", "soon"],
                "must be a length of time such as 90s, 30 min, 2h, 1d, 1w or 1h30m, got 'soon'",
            ),
            (["t", "--delay", "1h-5m"], "must be a length of time"),
            (["t", "--delay", "9" * 30 + "w"], "must be within the range of dates"),
            (["t", "--at", "tomorrow"], "must be a time such as 2031-05-04, 2031-05-04T12:00"),
        ],
    )
    def test_what_no_task_can_have_is_refused(self, run, engine, arguments, said):
        done = run("add", *arguments)

        assert (done.exit_code, said in done.output) == (2, True), done.output
        assert "Traceback" not in done.output
        assert task(engine, 1) is None


class TestList:
    def rows(self, run, *options: str) -> list[dict]:
        return [json.loads(line) for line in run("list", "--json", *options).stdout.splitlines()]

    def ids(self, run, *options: str) -> list[int]:
        return [row["id"] for row in self.rows(run, *options)]

    def test_the_newest_come_first_and_a_page_ends_with_where_the_next_begins(self, run, add):
        ids = [add() for _ in range(5)]

        assert self.ids(run, "--limit", "3") == ids[:1:-1]
        assert f"--before {ids[2]}" in run("list", "--limit", "3").stderr
        assert self.ids(run, "--before", str(ids[2])) == ids[1::-1]

    def test_it_filters(self, run, add):
        old = add("a", created_at=ago(hours=2))
        failed = add("a", **has_failed())
        mail = add("b", queue="mails")

        assert self.ids(run, "--type", "a") == [failed, old]
        assert self.ids(run, "--state", "failed") == [failed]
        assert self.ids(run, "--queue", "mails") == [mail]
        assert self.ids(run, "--since", "1h") == [mail, failed]
        assert self.ids(run, "--since", ago(hours=3).isoformat()) == [mail, failed, old]
        assert self.ids(run, "--state", "pending", "--queue", "mails", "--type", "b", "--since", "1h") == [
            mail
        ]

    @pytest.mark.parametrize("state", ["pending", "running", "completed", "failed", "cancelled"])
    def test_it_finds_each_state(self, run, add, state):
        for each in ("pending", "running", "completed", "failed", "cancelled"):
            add(state=each)

        assert [row["state"] for row in self.rows(run, "--state", state)] == [state]

    def test_it_finds_what_runs_without_a_note(self, run, engine, add):
        add(queue="a"), add(queue="b", state="running"), add(queue="c", state="running")
        with engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM apoq_claims")
        last = add(queue="c", state="running")

        queues = [row["queue"] for row in self.rows(run, "--state", "running")]

        assert queues == ["c", "c", "b"]
        assert self.ids(run, "--state", "running", "--queue", "b")
        assert len(self.ids(run, "--state", "running", "--before", str(last))) == 2

    def test_people_see_what_a_task_is_about(self, run, add):
        add("send", {"user_id": 7}, process_at=ago(minutes=5))
        add("later", process_at=ago(hours=-3))
        add("ran", state="completed", completed_at=ago(minutes=30))
        add("runs", state="running", claimed_at=ago(seconds=10))
        add("broke", **has_failed(), error={"class": "KeyError", "message": "'locale'", "traceback": "…"})

        lines = {line.split()[1]: line for line in run("list").stdout.splitlines()[2:]}

        assert '{"user_id": 7}' in lines["send"]
        assert "due 5 min ago" in lines["send"]
        assert "in 3 h" in lines["later"]
        assert "30 min ago" in lines["ran"]
        assert "for 1" in lines["runs"]
        assert "KeyError: 'locale'" in lines["broke"]

    def test_programs_get_data_whole(self, run, add):
        add("send", {"text": "x" * 1_000})

        (row,) = self.rows(run)

        assert row["data"] == {"text": "x" * 1_000}
        assert row["created_at"].startswith("20")

    def test_nothing_is_said_of_nothing(self, run):
        assert run("list").output == "No tasks.\n"
        assert run("list", "--json").output == ""

    def test_a_search_ends_somewhere_and_says_how_to_go_on(self, run, add, monkeypatch):
        wanted = add("rare")
        for _ in range(5):
            add("common")
        monkeypatch.setattr(find, "LOOKED_AT", 3)
        monkeypatch.setattr(listing, "LOOKED_AT", 3)
        find.find.cache_clear(), find.horizon.cache_clear()

        first = run("list", "--type", "rare", "--json")
        second = run("list", "--type", "rare", "--json", "--before", "4")
        find.find.cache_clear(), find.horizon.cache_clear()

        assert (first.stdout, "Examined 3 tasks: add --before 4 to continue" in first.stderr) == ("", True)
        assert json.loads(second.stdout)["id"] == wanted

    def test_what_a_terminal_would_obey_is_not_sent_to_it(self, run, add):
        add("evil\x1b[2J[red]:smile:", **has_failed(), error={"class": "E", "message": "\x1b]0;title\x07"})

        shown = run("list").output

        assert "\x1b" not in shown
        assert "[red]:smile:" in shown

    def test_rows_that_python_has_no_value_for_are_listed(self, run, engine):
        deep = "[" * 3_000 + "]" * 3_000
        with engine.begin() as connection:
            connection.execute(
                sa.text("INSERT INTO apoq_tasks (type, data, process_at) VALUES ('t', :data, 'infinity')"),
                {"data": deep},
            )

        assert self.rows(run)[0]["data"] == deep
        assert "in " in run("list").output
        assert run("show", "1").exit_code == 0

    def test_what_is_printed_is_json_whatever_stands_in_a_row(self, run, engine):
        data = '{"a": ' + "9" * 400 + ".5}"
        with engine.begin() as connection:
            connection.execute(
                sa.text("INSERT INTO apoq_tasks (type, data, error) VALUES ('t', :data, :data)"),
                {"data": data},
            )

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        for command in ("list", "show 1"):
            told = json.loads(run(*command.split(), "--json").stdout, parse_constant=refuse)
            assert (told["data"], told["error"]) == (data, {"a": "inf"})

    def test_on_a_terminal_json_is_ascii(self, engine, add):
        add("evil\x9b2J\u202e 💖")
        url = engine.url.render_as_string(hide_password=False)
        leader, follower = pty.openpty()
        command = [sys.executable, "-m", "apoq", "list", "--json", "--database-url", url]
        subprocess.run(command, stdout=follower, check=True)
        os.close(follower)

        shown = os.read(leader, 10_000)

        os.close(leader)
        assert shown.isascii()
        assert json.loads(shown)["type"] == "evil\x9b2J\u202e 💖"

    @pytest.mark.parametrize(
        "options",
        [["--limit", "0"], ["--limit", "x"], ["--state", "lost"], ["--since", "then"], ["--before", "x"]],
    )
    def test_nonsense_is_a_usage_error(self, run, options):
        assert run("list", *options).exit_code == 2


class TestFailures:
    """Failed tasks are grouped by type, class of error and place."""

    APP = """Traceback (most recent call last):
  File "/usr/lib/python3.11/site-packages/apoq/worker/x.py", line 9, in run
  File "/srv/app/{file}", line {line}, in charge
    raise KeyError
  File "/usr/lib/python3.11/site-packages/stripe/api.py", line 1, in post
    raise error
{error}: gone
"""

    def fail(self, add, type_: str = "charge", error: str = "KeyError", line: int = 12, **columns) -> int:
        traceback = self.APP.format(file="billing.py", line=line, error=error)
        stored = {"class": error, "message": f"gone {line}", "traceback": traceback}
        return add(type_, **{**has_failed(), "error": stored, **columns})

    def groups(self, run, *options: str) -> list[dict]:
        return [json.loads(line) for line in run("failures", "--json", *options).stdout.splitlines()]

    def test_by_type_error_and_the_line_of_the_application(self, run, add):
        for _ in range(3):
            last = self.fail(add)
        self.fail(add, line=30)
        self.fail(add, error="OSError", queue="other")
        self.fail(add, "mail")
        add("fine")

        first, *others = self.groups(run)

        assert {
            name: first[name] for name in ("type", "error_class", "where", "count", "last_id", "message")
        } == {
            "type": "charge",
            "error_class": "KeyError",
            "where": "billing.py:12 in charge",
            "count": 3,
            "last_id": last,
            "message": "gone 12",
        }
        assert [group["count"] for group in others] == [1, 1, 1]
        assert {group["where"] for group in others} == {"billing.py:12 in charge", "billing.py:30 in charge"}

    def test_it_filters(self, run, add):
        self.fail(add, failed_at=ago(days=2))
        self.fail(add, "mail", queue="other")

        assert [group["type"] for group in self.groups(run, "--since", "1h")] == ["mail"]
        assert [group["type"] for group in self.groups(run, "--queue", "default")] == ["charge"]
        assert [group["type"] for group in self.groups(run, "--type", "mail")] == ["mail"]

    def test_people_see_a_table(self, run, add):
        self.fail(add)

        said = run("failures", "--since", "1h")

        assert "billing.py:12 in charge" in said.stdout
        assert "3 min ago" in said.stdout
        assert "Only tasks that failed since" in said.stderr

    def test_an_error_without_a_traceback_or_of_another_program_is_a_group_too(self, run, engine, add):
        add("a", **has_failed())
        add("b", **has_failed(), error={"class": "KeyError"})

        assert [(group["type"], group["where"]) for group in self.groups(run)] == [("b", None), ("a", None)]

    def test_nothing_is_said_of_nothing(self, run):
        assert run("failures").output == "No failed tasks.\n"
        assert run("failures", "--json").output == ""

    def test_more_than_are_examined_are_mentioned(self, run, add, monkeypatch):
        monkeypatch.setattr("apoq.monitor.failures.EXAMINED", 2)
        for _ in range(3):
            self.fail(add)

        said = run("failures")

        assert "there may be more" in said.stderr
        assert self.groups(run)[0]["count"] == 2


class TestShow:
    def test_people_see_all_that_is_known(self, run, add):
        task_id = add(
            "send",
            {"user_id": 7},
            **has_failed(),
            priority=3,
            timeout=timedelta(seconds=30),
            error={"class": "KeyError", "message": "'locale'", "traceback": "Traceback …\n  File x, line 1"},
        )

        shown = run("show", str(task_id)).output

        for part in (
            "send",
            "failed",
            '"user_id": 7',
            "(3 min ago)",
            "30 s",
            "attempt",
            "1 (the retry limit is that of the function), 1 failed",
            "KeyError: 'locale'",
        ):
            assert part in shown
        assert "  File x, line 1" in shown

    def test_long_data_is_cut_unless_asked_for_whole(self, run, add):
        task_id = add("send", list(range(1_000)))

        cut, whole = run("show", str(task_id)).output, run("show", "--full", str(task_id)).output

        assert "more lines: --full shows them" in cut
        assert "999" not in cut
        assert "999" in whole

    def test_programs_get_json(self, run, add):
        told = json.loads(run("show", str(add("send", {"a": [1]})), "--json").output)

        assert (told["type"], told["data"], told["completed_at"]) == ("send", {"a": [1]}, None)

    def test_what_does_not_exist_is_said_to_with_an_exit_code(self, run):
        done = run("show", "99")

        assert (done.exit_code, done.stdout) == (1, "")
        assert "there is no task 99" in done.stderr

    @pytest.mark.parametrize("task_id", ["seven", str(2**64)])
    def test_what_is_no_id_is_a_usage_error(self, run, task_id):
        assert run("show", task_id).exit_code == 2


class TestPrune:
    @pytest.fixture
    def ended(self, add) -> dict[str, int]:
        return {
            "old": add(state="completed", completed_at=ago(days=2)),
            "young": add(state="completed", completed_at=ago(minutes=1)),
            "failed": add(state="failed", failed_at=ago(days=8)),
            "cancelled": add(queue="mails", state="cancelled", cancelled_at=ago(days=8)),
            "pending": add(created_at=ago(days=99)),
        }

    def left(self, engine, ended) -> set[str]:
        return {name for name, task_id in ended.items() if task(engine, task_id)}

    def test_it_deletes_what_completed_long_ago(self, run, engine, ended):
        done = run("prune", "--completed-before", "1d")

        assert (done.exit_code, done.output) == (0, "Deleted 1 task.\n")
        assert self.left(engine, ended) == set(ended) - {"old"}

    def test_it_asks_before_it_deletes_more_than_one(self, run, engine, ended):
        refused = run("prune", "--completed-before", "1d", "--failed-before", "7d")

        assert refused.exit_code == 2
        assert "Delete 3 tasks permanently?" in refused.output
        assert self.left(engine, ended) == set(ended)

        assert run("prune", "--completed-before", "1d", "--failed-before", "7d", "--yes").exit_code == 0
        assert self.left(engine, ended) == {"young", "pending"}

    def test_one_queue_may_be_chosen(self, run, engine, ended):
        told = run("prune", "--failed-before", "7d", "--queue", "mails", "--json")

        assert json.loads(told.output) == {"deleted": 1, "kept": 0}
        assert self.left(engine, ended) == set(ended) - {"cancelled"}

    def test_it_works_in_bounded_batches(self, run, engine, add, monkeypatch):
        monkeypatch.setattr(pruner, "BATCH_SIZE", 2)
        ids = [add(state="completed", completed_at=ago(days=2)) for _ in range(5)]

        done = run("prune", "--completed-before", "1d", "--yes")

        assert done.output == "Deleted 5 tasks.\n"
        assert not any(task(engine, each) for each in ids)

    def test_what_a_row_of_the_applications_points_at_stays_and_nothing_else_with_it(self, run, engine, add):
        ids = [add(state="completed", completed_at=ago(days=2)) for _ in range(5)]
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE mails (task_id bigint REFERENCES apoq_tasks)")
            connection.execute(sa.text("INSERT INTO mails VALUES (:id)"), {"id": ids[1]})

        done = run("prune", "--completed-before", "1d", "--yes")

        with engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE mails")
        assert (done.exit_code, done.output) == (
            0,
            "Deleted 4 tasks.\n1 task can't be deleted, such as because of a foreign key.\n",
        )
        assert [bool(task(engine, each)) for each in ids] == [False, True, False, False, False]

    @pytest.mark.as_owner("the role is the test's own")
    def test_a_role_that_may_not_delete_is_told_so(self, run, engine, ended):
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE ROLE apoq_reader LOGIN")
            connection.exec_driver_sql("GRANT SELECT, UPDATE ON ALL TABLES IN SCHEMA public TO apoq_reader")
        url = engine.url.set(username="apoq_reader").render_as_string(hide_password=False)
        try:
            done = run("prune", "--completed-before", "1d", "--database-url", url)
        finally:
            with engine.begin() as connection:
                connection.exec_driver_sql("DROP OWNED BY apoq_reader; DROP ROLE apoq_reader")

        assert (done.exit_code, "use another role" in done.stderr) == (1, True), done.output
        assert self.left(engine, ended) == set(ended)

    def test_queues_that_were_not_looked_through_are_spoken_of(self, run, engine, ended, monkeypatch):
        monkeypatch.setattr(prune, "MAX_QUEUES", 1)

        for options in ([], ["--json"]):
            done = run("prune", "--completed-before", "1d", "--yes", *options)
            assert "Only the first 1 queues were examined" in done.stderr
        by_name = run("prune", "--completed-before", "1d", "--queue", "mails", "--yes")

        assert (by_name.exit_code, by_name.stderr) == (0, "")

    def test_where_nothing_is_old_nothing_is_deleted(self, run, ended):
        assert run("prune", "--completed-before", "5w").output == "No tasks ended that long ago.\n"

    @pytest.mark.parametrize(
        ("options", "code", "said"),
        [
            ([], 2, "Which tasks?"),
            (["--completed-before", "yesterday"], 2, "must be a length of time"),
            (["--completed-before", "1d", "--queue", "nowhere"], 1, "there is no queue 'nowhere'"),
        ],
    )
    def test_nonsense_is_refused(self, run, ended, options, code, said):
        done = run("prune", *options)

        assert (done.exit_code, said in done.output) == (code, True), done.output


class TestRetry:
    def test_a_failed_task_is_pending_again(self, run, engine, add):
        task_id = add(**has_failed())

        done = run("retry", str(task_id))

        assert (done.exit_code, done.output) == (0, "Retried 1 task.\n")
        assert (task(engine, task_id).state, task(engine, task_id).fail_count) == ("pending", 0)

    def test_it_asks_before_it_touches_more_than_one(self, run, engine, add):
        ids = [add(**has_failed()), add(**has_failed())]

        refused = run("retry", *map(str, ids))

        assert refused.exit_code == 2
        assert "Retry 2 tasks?" in refused.output
        assert [task(engine, each).state for each in ids] == ["failed", "failed"]

        assert run("retry", *map(str, ids), "--yes").output == "Retried 2 tasks.\n"
        assert [task(engine, each).state for each in ids] == ["pending", "pending"]

    def test_options_choose_in_any_queue(self, run, engine, add):
        ids = {
            "wanted": add("send", **has_failed()),
            "elsewhere": add("send", queue="mails", **has_failed()),
            "other type": add("count", **has_failed()),
            "cancelled": add("send", state="cancelled"),
            "pending": add("send"),
        }

        run("retry", "--type", "send", "--yes")

        assert {name: task(engine, each).state for name, each in ids.items()} == {
            "wanted": "pending",
            "elsewhere": "pending",
            "other type": "failed",
            "cancelled": "cancelled",
            "pending": "pending",
        }

    def test_another_state_may_be_chosen(self, run, engine, add):
        failed, cancelled = add(**has_failed()), add(state="cancelled")

        run("retry", "--state", "cancelled")

        assert [task(engine, each).state for each in (failed, cancelled)] == ["failed", "pending"]

    def test_many_go_in_several_transactions(self, run, engine, add, monkeypatch):
        monkeypatch.setattr(selection, "BATCH", 2)
        ids = [add(**has_failed()) for _ in range(5)]

        done = run("retry", "--state", "failed", "--yes")

        assert done.output == "Retried 5 tasks.\n"
        assert {task(engine, each).state for each in ids} == {"pending"}

    def test_where_none_is_chosen_none_is_retried(self, run):
        assert run("retry", "--state", "failed").output == "Retried 0 tasks.\n"


class TestRetryLater:
    def due_in(self, engine, task_id: int) -> float:
        with engine.connect() as connection:
            due_in = sa.func.extract("epoch", Task.process_at - sa.func.clock_timestamp())
            return float(connection.scalar(sa.select(due_in).where(Task.id == task_id)))

    def test_after_a_delay(self, run, engine, add):
        task_id = add(**has_failed())

        done = run("retry", str(task_id), "--delay", "10m")

        assert re.fullmatch(
            r"Retried 1 task: due in 10 min \(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \w+\)\.\n", done.output
        )
        assert 540 < self.due_in(engine, task_id) <= 600

    def test_one_after_the_other(self, run, engine, add):
        ids = [add(**has_failed()) for _ in range(3)]

        done = run("retry", "--state", "failed", "--delay", "1h", "--every", "10 min", "--yes")

        assert "Retried 3 tasks: the first is due in 60 min, the last in 80 min" in done.output
        waits = [self.due_in(engine, task_id) / 60 for task_id in ids]
        assert [round(wait - waits[0]) for wait in waits] == [0, 10, 20]
        assert 59 < waits[0] <= 60

    def test_the_first_is_due_at_once_unless_there_is_a_delay(self, run, engine, add):
        first, second = add(**has_failed()), add(**has_failed())

        done = run("retry", "--state", "failed", "--every", "1d", "--yes")

        assert "the first is due now, the last in 24 h" in done.output
        assert self.due_in(engine, first) <= 0
        assert 86_000 < self.due_in(engine, second) <= 86_400

    @pytest.mark.parametrize("option", ["--delay", "--every"])
    def test_a_century_is_too_long(self, run, add, option):
        ids = [str(add(**has_failed())) for _ in range(2)]

        done = run("retry", *ids, option, "99999d", "--yes")

        assert (done.exit_code, "more than a century from now" in done.output) == (2, True)


class TestSince:
    """It is compared with the time of what happened last: people ask what failed since yesterday."""

    def listed(self, run, *options: str) -> set[int]:
        return {json.loads(line)["id"] for line in run("list", "--json", *options).stdout.splitlines()}

    def test_a_task_that_was_added_long_ago_and_failed_just_now_is_found(self, run, engine, add):
        long_ago = ago(days=3)
        failed = add(**has_failed(), created_at=long_ago)
        completed = add(state="completed", completed_at=ago(minutes=1), created_at=long_ago)
        cancelled = add(state="cancelled", cancelled_at=ago(minutes=1), created_at=long_ago)
        running = add(state="running", claimed_at=ago(minutes=1), created_at=long_ago)
        old = add(state="failed", failed_at=ago(days=2), created_at=long_ago)
        old_one, new_one = add(created_at=long_ago), add()

        assert self.listed(run, "--since", "1h") == {failed, completed, cancelled, running, new_one}
        assert self.listed(run, "--since", "4d") >= {old, old_one}
        assert run("retry", "--state", "failed", "--since", "1h").output.startswith(
            "Retried 1 task that failed"
        )
        assert (task(engine, failed).state, task(engine, old).state) == ("pending", "failed")

    def test_the_output_says_since_when_in_local_time(self, run, add, monkeypatch):
        monkeypatch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        try:
            add(**has_failed())
            said = run("list", "--state", "failed", "--since", "2026-11-29").stderr
        finally:
            monkeypatch.undo()
            time.tzset()

        assert said == "Only tasks that failed since 2026-11-29 00:00:00 JST.\n"


class TestRetrying:
    """A task that waits for its next attempt is pending, and yet no fresh one."""

    @pytest.fixture
    def waits(self, add) -> int:
        return add(
            fail_count=1,
            attempt=1,
            failed_at=ago(seconds=5),
            process_at=ago(hours=-1),
            error={"class": "ConnectionError", "message": "refused", "traceback": "", "retry_limit": "5"},
        )

    def test_it_is_listed_with_its_error(self, run, add, waits):
        add(data={"user_id": 7})

        lines = run("list").output.splitlines()

        assert re.search(r"retrying +in 60 min +ConnectionError: refused", lines[3])
        assert re.search(r'pending +due \d s ago +\{"user_id": 7\}', lines[2])
        assert "data or error" in lines[0]

    def test_it_can_be_filtered_for(self, run, add, waits):
        add(), add(**has_failed())

        (line,) = run("list", "--retrying", "--json").stdout.splitlines()

        assert json.loads(line)["id"] == waits

    def test_it_is_pending(self, run, waits):
        done = run("list", "--retrying", "--state", "failed")

        assert (done.exit_code, "leave out --state failed" in done.output) == (2, True)

    def test_it_can_be_cancelled(self, run, engine, add, waits):
        other = add()

        run("cancel", "--retrying")

        assert (task(engine, waits).state, task(engine, other).state) == ("cancelled", "pending")

    def test_a_rescue_is_shown_with_the_next_attempt_and_the_limit(self, run, waits):
        shown = run("show", str(waits)).output

        assert re.search(r"state +retrying \(pending: waits for its next attempt\)", shown)
        assert re.search(r"next attempt +\d{4}-.* \(in 60 min\)", shown)
        assert re.search(r"attempt +1 of 6, 1 failed", shown)
        assert "last error (5 s ago)" in shown

    def test_a_unique_key_is_shown_and_whether_it_is_held(self, run, engine, add):
        held = add(unique_key="k", held_unique_key="k")
        given_up = add(unique_key="l", unique_until_end=True)

        assert re.search(r"unique key +k \(held until it has started\)", run("show", str(held)).output)
        assert re.search(r"unique key +l *\n", run("show", str(given_up)).output)
        assert re.search(rf"{held} +\S+ +k +pending", run("list").output)

    def test_an_own_limit_needs_no_error(self, run, add):
        assert re.search(r"attempt +none yet, 4 at most", run("show", str(add(retry_limit=3))).output)


class TestByError:
    def test_tasks_are_found_by_the_class_of_their_error(self, run, engine, add):
        ids = {
            name: add(**has_failed(), error={"class": name, "message": "", "traceback": ""})
            for name in ("ValueError", "KeyError")
        }
        add(**has_failed())

        (line,) = run("list", "--error", "ValueError", "--json").stdout.splitlines()
        retried = run("retry", "--error", "KeyError")

        assert json.loads(line)["id"] == ids["ValueError"]
        assert retried.output == "Retried 1 task.\n"
        assert task(engine, ids["KeyError"]).state == "pending"

    def test_whatever_stands_there_for_an_error(self, run, engine, add):
        add(**has_failed())
        with engine.begin() as connection:
            connection.execute(sa.update(Task).values(error=sa.text("'[1]'::jsonb")))

        assert run("list", "--error", "ValueError").output == "No tasks.\n"


class TestTheWorkerOfATask:
    def test_it_is_shown_by_host_and_process(self, run, engine, add):
        worker_id = uuid4()
        with engine.begin() as connection:
            connection.execute(
                sa.insert(WorkerRow).values(
                    id=worker_id,
                    host="web-1",
                    pid=4242,
                    version="1",
                    queues=["default"],
                    concurrency=4,
                    expires_at=ago(minutes=-1),
                    grace=timedelta(seconds=5),
                )
            )

        shown = run("show", str(add(state="running", worker_id=worker_id, claimed_at=ago(seconds=3)))).output

        assert re.search(r"worker +web-1, process 4242", shown)

    def test_one_that_has_stopped_has_only_its_id(self, run, add):
        worker_id = uuid4()

        assert f"{worker_id}, which has stopped" in run("show", str(add(worker_id=worker_id))).output


class TestCancel:
    def test_a_pending_task_is_cancelled(self, run, engine, add):
        task_id = add(queue="mails")

        done = run("cancel", str(task_id))

        assert (done.exit_code, done.output) == (0, "Cancelled 1 task.\n")
        assert task(engine, task_id).state == "cancelled"

    def test_options_choose_what_is_pending_or_running(self, run, engine, add):
        ids = [add("send"), add("send", state="running"), add("send", state="completed"), add("other")]

        run("cancel", "--type", "send", "--yes")

        assert [task(engine, each).state for each in ids] == [
            "cancelled",
            "cancelled",
            "completed",
            "pending",
        ]


@pytest.mark.parametrize("name", ["retry", "cancel"])
class TestRetryAndCancel:
    @pytest.mark.parametrize("queue", ["", "q" * 300], ids=len)
    @pytest.mark.parametrize("by", [["1"], ["--type", "t", "--yes"]], ids=["by id", "by type"])
    def test_a_task_of_a_queue_that_no_queue_can_be_is_changed_too(self, run, engine, name, queue, by):
        state, new = ("failed", "pending") if name == "retry" else ("pending", "cancelled")
        with engine.begin() as connection:
            connection.execute(
                sa.text("INSERT INTO apoq_tasks (type, queue, state) VALUES ('t', :queue, :state)"),
                {"queue": queue, "state": state},
            )

        done = run(name, *by)

        assert (done.exit_code, task(engine, 1).state) == (0, new), done.output

    def test_what_does_not_exist_is_said_with_an_exit_code(self, run, name):
        done = run(name, "99")

        assert (done.exit_code, done.stdout) == (1, "")
        assert "there is no task 99" in done.stderr

    def test_what_can_not_be_changed_is_said_to_and_the_others_are(self, run, engine, add, name):
        ids = {"pending": add(), "failed": add(**has_failed())}
        changed, left = ("failed", "pending") if name == "retry" else ("pending", "failed")

        done = run(name, *map(str, ids.values()), "99", "--yes")

        assert done.exit_code == 1
        assert done.stdout.endswith("ed 1 task.\n")
        assert f"task {ids[left]} is {left}: only " in done.stderr
        assert "there is no task 99" in done.stderr
        assert task(engine, ids[changed]).state != changed

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ([], "Which tasks?"),
            (["7", "--type", "send"], "not both"),
            (["seven"], "must be a task's ID, which is a whole number, got 'seven'"),
            ([str(2**64)], "must be a task's ID"),
            (["--state", "lost"], "is not one of"),
        ],
    )
    def test_nonsense_is_a_usage_error(self, run, name, arguments, said):
        done = run(name, *arguments)

        assert (done.exit_code, said in done.output) == (2, True), done.output


COMMANDS = ["add t", "list", "show 7", "retry 7", "cancel 7", "prune --failed-before 1d", "stats"]


@pytest.mark.parametrize("command", COMMANDS)
class TestTheDatabase:
    def test_one_without_the_tables_is_said_with_the_cure(self, run, engine, command):
        done = run(*command.split(), "--schema", "nowhere")

        assert done.exit_code == 4
        assert "in the schema 'nowhere' are missing" in done.stderr
        assert "apoq migrate" in done.stderr

    def test_one_that_is_away_is_said_without_the_password(self, run, command):
        done = run(*command.split(), "--database-url", f"postgresql://app:{SECRET}@127.0.0.1:1/app")

        assert done.exit_code == 3
        assert "can't be reached" in done.stderr
        assert (SECRET in done.output, "Traceback" in done.output) == (False, False)

    @pytest.mark.parametrize("url", [f"postgresql://app:{SECRET}@host:port/app", f"mysql://app:{SECRET}@h/a"])
    def test_a_malformed_url_is_a_usage_error_without_the_password(self, run, command, url):
        done = run(*command.split(), "--database-url", url)

        assert done.exit_code == 2
        assert (SECRET in done.output, "Traceback" in done.output) == (False, False)


def test_a_schema_of_its_own_does_as_well(run, module_engine):
    prepare(module_engine, schema="jobs")

    said = [
        run(*command.split(), "--schema", "jobs")
        for command in ("add t", "add t", "list", "cancel 1", "retry 1", "show 1", "stats", "doctor")
    ]

    assert [(done.exit_code, done.exception) for done in said] == [(0, None)] * len(said)
    assert "pending" in said[5].output
    assert len(run("list", "--json", "--schema", "jobs").stdout.splitlines()) == 2
    assert run("list").output == "No tasks.\n"


@pytest.mark.parametrize("command", ["add", "retry", "cancel", "prune"])
def test_an_example_in_a_help_stands_on_lines_of_its_own(run, command):
    lines = run(command, "--help").output.splitlines()

    assert [line for line in lines if line.startswith(f"      apoq {command} ")]
