"""The command line's half that looks on: stats, doctor, demo."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from uuid import uuid4

import probe
import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result
from rich.console import Console
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from apoq import Queue, Worker, prepare
from apoq.cli import main
from apoq.cli.stats import MAX_NAME_COLUMNS, shown
from apoq.cli.target import Target
from apoq.embedded import PostgreSQL
from apoq.monitor import server_checks, table_checks
from apoq.monitor.check import BAD, OK, WARNING
from apoq.schema.statements import count
from apoq.schema.statements.running import LOOKED_AT
from apoq.schema.tables import ClaimRow, WorkerRow

SECRET = "s3cr3t"
TABLES = "ON ALL TABLES IN SCHEMA public TO {role}; GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {role}"


@pytest.fixture
def run(engine, monkeypatch) -> Callable[..., Result]:
    """Call the command line on the test's database."""
    monkeypatch.setenv("APOQ_DATABASE_URL", engine.url.render_as_string(hide_password=False))

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(main, arguments)

    return call


@pytest.fixture
def add(engine) -> Callable[..., int]:
    def call(type_: str = "t", *, queue: str = "default", **columns: object) -> int:
        with Session(engine) as session, session.begin():
            task = Queue(queue).add(session, type_)
            session.flush()
            for name, value in columns.items():
                setattr(task, name, value)
            if task.state == "running":
                session.add(ClaimRow(worker_id=task.worker_id or uuid4(), number=0, task_ids=[task.id]))
            if task.state == "completed":
                task.completed_at = task.completed_at or task.created_at
            return task.id

    return call


@pytest.fixture
def enlist(engine) -> Callable[..., object]:
    """Enter a worker that was seen some time ago."""

    def call(
        *queues: str,
        seen: timedelta = timedelta(),
        lease: timedelta = timedelta(seconds=15),
        **columns: object,
    ) -> object:
        values = {"host": "web1", "pid": 7, "version": version("apoq"), "concurrency": 4, **columns}
        with engine.begin() as connection:
            statement = sa.insert(WorkerRow).values(
                id=sa.func.gen_random_uuid(),
                queues=list(queues or ["default"]),
                last_heartbeat_at=sa.func.clock_timestamp() - seen,
                expires_at=sa.func.clock_timestamp() - seen + lease,
                grace=lease * 0.3,
                **values,
            )
            return connection.scalar(statement.returning(WorkerRow.id))

    return call


@pytest.fixture
def forget_notes(engine) -> Callable[[], None]:
    """Delete the notes of all claims, as a restore without that table does."""

    def call() -> None:
        with engine.begin() as connection:
            connection.execute(sa.delete(ClaimRow))

    return call


def ago(**length: float) -> datetime:
    return datetime.now(UTC) - timedelta(**length)


class TestStats:
    def figures(self, run, *options: str) -> dict:
        return json.loads(run("stats", "--json", *options).stdout)

    def test_each_queue_is_counted_by_state(self, run, add, enlist):
        (
            add(process_at=ago(minutes=5)),
            add(priority=9),
            add(process_at=ago(hours=-1)),
            add(process_at=ago(hours=-2)),
        )
        add(state="running", worker_id=enlist(), claimed_at=ago(seconds=1))
        (
            add(state="completed", completed_at=ago(seconds=10)),
            add(state="completed", completed_at=ago(minutes=10)),
        )
        add(state="completed", completed_at=ago(hours=10))
        add(state="failed", failed_at=ago(hours=1)), add(state="cancelled", cancelled_at=ago(hours=1))
        add(queue="mails")

        default, mails = self.figures(run)["queues"]

        assert 299 < default.pop("lag") < 330
        assert default == {
            "name": "default",
            "ready": 2,
            "scheduled": 2,
            "retrying": 0,
            "waiting": 0,
            "running": 1,
            "completed": 3,
            "failed": 1,
            "cancelled": 1,
            "oldest_type": "t",
            "per_minute": 1,
            "last_hour": 2,
            "bytes": None,
            "bytes_per_day": None,
        }
        assert (mails["name"], mails["ready"], mails["completed"]) == ("mails", 1, 0)

    @pytest.mark.parametrize("state", ["pending", "running", "completed", "failed"])
    def test_a_queue_is_known_by_its_tasks_in_any_state(self, run, add, state):
        add(queue="a", state=state), add(queue="b", state=state)

        assert [queue["name"] for queue in self.figures(run)["queues"]] == ["a", "b"]

    def test_a_queue_is_known_by_its_workers(self, run, enlist):
        enlist("mails", "reports")

        assert [queue["name"] for queue in self.figures(run)["queues"]] == ["mails", "reports"]

    def test_counts_are_bounded(self, run, engine, monkeypatch):
        with engine.begin() as connection:
            Queue().add_many(connection, "t", [{}] * (count.COUNTED + 500))

        assert self.figures(run)["queues"][0]["ready"] == count.COUNTED + 1
        assert "10,000+" in run("stats").output

    def test_of_what_can_not_be_counted_the_rate_is_told(self, run, engine):
        with engine.begin() as connection:
            connection.exec_driver_sql(
                "INSERT INTO apoq_tasks (type, state, completed_at) SELECT 't', 'completed', "
                "now() - interval '1 ms' * n FROM generate_series(1, 20000) AS n"
            )

        rate = self.figures(run)["queues"][0]["per_minute"]

        # A thousand a second, counted for ten seconds and for as long as this test took until then.
        assert count.COUNTED < rate < 61_000

    def test_types_are_counted_where_asked_for(self, run, add):
        add("a"), add("a", state="failed"), add("b", state="running"), add("b", state="completed")

        counted = {each["type"]: each["counts"] for each in self.figures(run, "--types")["types"]}

        assert counted == {"a": {"pending": 1, "failed": 1}, "b": {"running": 1, "completed": 1}}
        assert self.figures(run)["types"] == []

    def test_a_worker_that_was_not_seen_for_its_lease_is_not_alive(self, run, add, enlist):
        alive, dead = enlist(host="web1"), enlist(host="web2", seen=timedelta(minutes=20))
        add(state="running", worker_id=alive), add(state="running", worker_id=dead)

        told = self.figures(run)

        assert [(each["host"], each["is_alive"], each["running"]) for each in told["workers"]] == [
            ("web1", True, 1),
            ("web2", False, 1),
        ]
        assert told["orphans"] == 1

    def test_how_long_a_worker_counts_as_alive_is_its_own_lease(self, run, add, enlist):
        patient = enlist(host="web1", seen=timedelta(minutes=1), lease=timedelta(minutes=10))
        hasty = enlist(host="web2", seen=timedelta(seconds=5), lease=timedelta(seconds=3))
        add(state="running", worker_id=patient), add(state="running", worker_id=hasty)

        told = self.figures(run)

        assert {each["host"]: each["is_alive"] for each in told["workers"]} == {"web1": True, "web2": False}
        assert told["orphans"] == 1

    def test_what_runs_without_a_note_is_counted_apart(self, run, add, enlist, forget_notes):
        add(state="running", worker_id=enlist(seen=timedelta(minutes=20)))
        add(state="running", worker_id=enlist()), add(state="running", queue="mails")
        forget_notes()
        add(state="running", worker_id=enlist(seen=timedelta(minutes=20)))

        told = self.figures(run)

        assert {queue["name"]: queue["running"] for queue in told["queues"]} == {"default": 3, "mails": 1}
        assert (told["unnoted"], told["orphans"]) == (3, 1)
        assert "3 tasks running that no claim has recorded" in run("stats").output

    def test_it_is_found_behind_no_more_than_a_bounded_number_of_others(self, run, engine, add, forget_notes):
        add(state="running", process_at=ago(hours=1)), add(state="running", priority=-1)
        forget_notes()
        with engine.begin() as connection:
            Queue().add_many(connection, "t", [{}] * LOOKED_AT)

        assert self.figures(run)["unnoted"] == 1

    def test_a_worker_at_work_is_seen(self, run, make_worker):
        worker = make_worker(Queue("mails"), concurrency=3)
        worker.start()

        (told,) = self.figures(run)["workers"]

        assert (told["queues"], told["concurrency"], told["is_alive"]) == (["mails"], 3, True)

    def test_a_workers_queues_are_those_of_the_schema(self, run, engine):
        prepare(engine, schema="jobs")
        worker = Worker(engine, Queue(), Queue(schema="jobs"), Queue("mails", schema="jobs"))
        worker.start()
        try:
            for schema, names in (([], ["default"]), (["--schema", "jobs"], ["default", "mails"])):
                told = self.figures(run, *schema)

                assert [each["queues"] for each in told["workers"]] == [names]
                assert [queue["name"] for queue in told["queues"]] == names
        finally:
            worker.stop()

    def test_people_get_it_in_80_columns(self, engine, add, enlist):
        add("a" * 200, queue="q" * 200, process_at=ago(days=9999))
        enlist("q" * 200, "r" * 200, host="h" * 200, seen=timedelta(days=9999))
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(shown(probe.stats_figures(Target(engine=engine), by_type=True), MAX_NAME_COLUMNS))

        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= 80
        assert "completed" in lines[0]

    def pending(self, add, *, retrying: int, scheduled: int, ready: int = 0) -> None:
        later = ago(hours=-1)
        for _ in range(retrying):
            add(fail_count=1, process_at=later)
        for _ in range(scheduled):
            add(process_at=later)
        for _ in range(ready):
            add(fail_count=1)

    def test_pending_tasks_are_ready_scheduled_or_retrying(self, run, add):
        self.pending(add, retrying=3, scheduled=2, ready=1)

        (queue,) = self.figures(run)["queues"]

        assert (queue["ready"], queue["scheduled"], queue["retrying"]) == (1, 2, 3)

    def test_those_that_are_due_later_share_a_bound(self, run, engine):
        with engine.begin() as connection:
            connection.exec_driver_sql(
                "INSERT INTO apoq_tasks (type, process_at, fail_count) "
                "SELECT 't', now() + interval '1 h', mod(n, 2) FROM generate_series(1, 12000) AS n"
            )

        (queue,) = self.figures(run)["queues"]

        assert queue["scheduled"] + queue["retrying"] == count.COUNTED + 1
        assert re.search(r"^default +· +[45],\d{3}\+ +[45],\d{3}\+ +·", run("stats").output, re.MULTILINE)

    def test_all_states_fit_80_columns_in_two_tables(self, engine, add):
        self.pending(add, retrying=1, scheduled=1, ready=1)
        for state in ("waiting", "completed", "failed", "cancelled"):
            add(state=state)
        found = probe.stats_figures(Target(engine=engine), by_type=False)

        def headings(width: int) -> list[str]:
            console = Console(width=width, record=True, file=io.StringIO())
            console.print(shown(found, MAX_NAME_COLUMNS, width))
            lines = console.export_text().splitlines()
            assert max(map(len, lines)) <= width
            return [" ".join(line.split()) for line in lines if line.startswith("queue")]

        unfinished, ended = "ready scheduled retrying waiting running", "completed failed cancelled"
        assert headings(80) == [f"queue {unfinished} lag", f"queue {ended} per min"]
        assert headings(120) == [f"queue {unfinished} {ended} lag per min"]

    def test_in_80_columns_a_state_without_tasks_is_left_out(self, engine, add):
        add(), add(state="completed"), add(state="cancelled")
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(shown(probe.stats_figures(Target(engine=engine), by_type=False), MAX_NAME_COLUMNS, 80))

        (heading, *_) = console.export_text().splitlines()

        states = ["ready", "scheduled", "running", "completed", "failed", "cancelled"]
        assert heading.split() == ["queue", *states, "lag", "per", "min"]

    def test_the_living_come_first_and_few_of_the_dead_are_shown(self, run, enlist):
        for number in range(5):
            enlist(host=f"dead-{number}", seen=timedelta(minutes=20))
        enlist(host="alive")

        lines = run("stats").output.splitlines()

        table = lines[lines.index(next(line for line in lines if line.startswith("worker"))) :]
        assert [line.split()[0].partition("-")[0] for line in table[2:6]] == ["alive", "dead", "dead", "dead"]
        assert table[6] == "… and 2 more have died in the last hour"

    def test_of_an_empty_database_there_is_nothing_to_tell(self, run):
        shown = run("stats").output

        assert "no workers are alive" in shown

    def test_watching_is_for_people(self, run):
        assert run("stats", "--watch", "--json").exit_code == 2

    def test_it_watches_until_it_is_told_to_stop(self, engine, add):
        add(queue="mails")
        url = engine.url.render_as_string(hide_password=False)
        leader, follower = pty.openpty()
        command = [sys.executable, "-m", "apoq", "stats", "--watch", "--every", "0.05", "--database-url", url]
        watching = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower)
        os.close(follower)
        try:
            seen = ""
            while seen.count("mails") < 3:
                seen += os.read(leader, 10_000).decode(errors="replace")
            watching.send_signal(signal.SIGINT)
            while watching.poll() is None:
                try:
                    seen += os.read(leader, 10_000).decode(errors="replace")
                except OSError:
                    break
        finally:
            os.close(leader)
            watching.kill()

        assert watching.wait() in (0, -signal.SIGKILL)
        assert "Traceback" not in seen


class TestDoctor:
    def findings(self, run, *options: str) -> dict[str, dict]:
        told = json.loads(run("doctor", "--json", *options).stdout)
        return {finding["subject"]: finding for finding in reversed(told)}

    def test_all_is_well_where_a_worker_is_at_work(self, run, make_worker):
        make_worker().start()

        done = run("doctor")

        assert done.exit_code == 0
        assert "Everything is OK." in done.output
        for subject in (
            "server",
            "encoding",
            "pooler",
            "notifications",
            "clock",
            "tables",
            "rights",
            "vacuum",
            "workers",
            "queues",
        ):
            assert f"✓ {subject}" in done.output

    def test_without_a_worker_it_works_and_that_is_worth_a_look(self, run):
        done = run("doctor")

        assert (done.exit_code, "No errors, 1 warning." in done.output) == (0, True)
        assert "→ start one: apoq worker" in done.output

    def test_missing_tables_are_to_be_mended(self, run, empty_url):
        done = run("doctor", "--database-url", empty_url.render_as_string(hide_password=False))

        assert done.exit_code == 1
        assert "✗ tables" in done.output
        assert "→ apoq migrate" in done.output

    def test_those_of_a_schema_too(self, run):
        done = run("doctor", "--schema", "jobs")

        assert done.exit_code == 1
        assert "there are none in the schema 'jobs'" in done.output
        assert "→ apoq migrate --schema jobs" in done.output

    def test_a_later_library_is_named(self, run, engine):
        with engine.begin() as connection:
            connection.exec_driver_sql("UPDATE apoq_migrations SET version_num = '0099'")

        assert self.findings(run)["tables"]["cure"] == "pip install --upgrade apoq"

    def test_tasks_that_nobody_works_are_to_be_mended(self, run, add, enlist):
        enlist("default")
        add(queue="mails", process_at=ago(minutes=5))

        finding = self.findings(run)["queues"]

        assert finding["level"] == BAD
        assert finding["text"] == "'mails' has had a task of type 't' due for 5 min, but no live worker"
        assert run("doctor").exit_code == 1

    def test_tasks_that_wait_for_long_are_worth_a_look(self, run, add, enlist):
        enlist("default")
        add(process_at=ago(minutes=5))

        assert self.findings(run)["queues"]["level"] == WARNING

    def test_a_task_whose_worker_is_gone_is_to_be_mended_where_nobody_is_alive(self, run, add, enlist):
        dead = enlist(seen=timedelta(minutes=20))
        add(state="running", worker_id=dead)

        assert self.findings(run)["running"]["level"] == BAD
        assert "died 20 min ago" in run("doctor").output

        enlist()
        assert self.findings(run)["running"]["level"] == WARNING

    def test_how_long_a_worker_counts_as_alive_is_its_own_lease(self, run, add, enlist):
        add(state="running", worker_id=enlist(seen=timedelta(minutes=1), lease=timedelta(minutes=10)))
        assert self.findings(run)["workers"]["text"] == "1 alive"
        assert "running" not in self.findings(run)

        add(state="running", worker_id=enlist(seen=timedelta(seconds=5), lease=timedelta(seconds=3)))

        assert "1 task running whose worker is not alive" in self.findings(run)["running"]["text"]

    def test_what_runs_without_a_note_is_worth_a_look(self, run, add, enlist, forget_notes):
        worker = enlist()
        add(state="running", worker_id=worker)
        assert "running" not in self.findings(run)

        forget_notes()

        finding = self.findings(run)["running"]
        assert (finding["level"], "1 task running that no claim" in finding["text"]) == (WARNING, True)
        assert "wait: a worker makes them pending within about 2 min" in finding["cure"]

    def test_a_worker_of_another_version_is_worth_a_look(self, run, enlist):
        enlist(version="0.0.9")

        assert "some with apoq 0.0.9" in self.findings(run)["workers"]["text"]

    def test_what_others_have_written_is_no_command_to_the_terminal(self, run, enlist):
        enlist(version="0.0.9\x1b[2J", host="\x1b]0;t\x07"), enlist(host="\x1b[2J", seen=timedelta(hours=1))

        assert "\x1b" not in run("doctor").output

    @pytest.mark.as_owner("it looks at the sessions of other roles")
    def test_a_transaction_that_holds_up_vacuum_is_named(self, run, engine, monkeypatch):
        monkeypatch.setattr(table_checks, "LONG_TRANSACTION", timedelta())
        holder = sa.create_engine(
            engine.url, connect_args={"application_name": "forgetful"}, poolclass=NullPool
        )
        with holder.begin() as connection:
            pid = connection.scalar(sa.text("SELECT pg_backend_pid() FROM txid_current()"))

            finding = self.findings(run)["transactions"]

        assert finding["level"] == WARNING
        assert "forgetful has been in a transaction for" in finding["text"]
        assert "idle in transaction" in finding["text"]
        assert f"pg_terminate_backend({pid})" in finding["cure"]

    @pytest.mark.parametrize(
        ("index", "is_named"),
        [
            ("(state)", True),
            ("(created_at) WHERE state = 'failed'", True),
            ("((worker_id IS NULL))", True),
            ("(type)", False),
        ],
    )
    def test_an_index_that_claims_have_to_write_to_is_worth_a_look(self, run, engine, index, is_named):
        with engine.begin() as connection:
            connection.exec_driver_sql(f'CREATE INDEX "theirs, of old" ON apoq_tasks {index}')

        findings = self.findings(run)

        assert ("indexes" in findings) is is_named
        if is_named:
            assert findings["indexes"]["level"] == WARNING
            assert 'DROP INDEX CONCURRENTLY "theirs, of old",' in findings["indexes"]["cure"]

    def test_autovacuum_that_is_off_is_to_be_mended(self, run, engine):
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE apoq_tasks SET (autovacuum_enabled = false)")

        finding = self.findings(run)["vacuum"]

        assert (finding["level"], "RESET (autovacuum_enabled)" in finding["cure"]) == (BAD, True)

    @pytest.mark.parametrize("name", ["statement_timeout", "idle_in_transaction_session_timeout"])
    def test_a_short_timeout_is_worth_a_look(self, run, engine, name):
        with engine.begin() as connection:
            connection.exec_driver_sql(f"ALTER DATABASE {engine.url.database} SET {name} = '10s'")

        finding = self.findings(run)["timeouts"]

        assert (finding["level"], f"{name} is 10 s" in finding["text"]) == (WARNING, True)

    def test_another_encoding_is_to_be_mended(self, run, admin, engine):
        url = engine.url.set(database=f"{engine.url.database}_latin1")
        create = "CREATE DATABASE {} TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'"
        with admin.connect() as connection:
            connection.exec_driver_sql(create.format(url.database))
        try:
            told = self.findings(run, "--database-url", url.render_as_string(hide_password=False))
        finally:
            with admin.connect() as connection:
                connection.exec_driver_sql(f"DROP DATABASE {url.database} WITH (FORCE)")

        assert (told["encoding"]["level"], told["tables"]["level"]) == (BAD, BAD)

    def test_clocks_that_differ_are_worth_a_look(self, run, monkeypatch):
        import time

        here = time.time
        monkeypatch.setattr(server_checks.time, "time", lambda: here() - 90)

        finding = self.findings(run)["clock"]

        assert (finding["level"], finding["text"]) == (
            WARNING,
            "the server's is 90 s ahead of this machine's",
        )

    def test_connections_that_run_out_are_told_of(self, run, monkeypatch):
        monkeypatch.setattr(server_checks, "CROWDED", 0.0)
        assert self.findings(run)["connections"]["level"] == WARNING

        monkeypatch.setattr(server_checks, "FULL", 0.0)
        assert self.findings(run)["connections"]["level"] == BAD

    def test_notifications_that_do_not_arrive_are_worth_a_look(self, run, monkeypatch):
        monkeypatch.setattr(server_checks, "_notify", lambda own: None)

        finding = self.findings(run)["notifications"]

        assert (finding["level"], "listen_url" in finding["cure"]) == (WARNING, True)

    @pytest.mark.parametrize(
        ("told", "host", "level", "named"),
        [
            ("PostgreSQL 15.0 on x86_64", "db", OK, "PostgreSQL 15.0"),
            ("CockroachDB CCL v25.2.1", "db", BAD, "CockroachDB"),
            ("PostgreSQL 15.2-YB-2025.1.0.0-b0 on x86_64", "db", BAD, "YugabyteDB"),
            ("PostgreSQL 16", "xy.dsql.us-east-1.on.aws", BAD, "Aurora DSQL"),
            ("PostgreSQL 8.0.2 on i686, Redshift 1.0", "db", BAD, "Amazon Redshift"),
        ],
    )
    def test_who_only_speaks_like_postgresql_is_known(self, told, host, level, named):
        row = {"version": told, "server_version": "15.0", "server_version_num": "150000"}

        finding = probe.flavour(row, host)

        assert (finding.level, named in finding.text) == (level, True)

    def test_an_old_server_is_to_be_mended(self):
        row = {"version": "PostgreSQL 14.9", "server_version": "14.9", "server_version_num": "140009"}

        assert probe.flavour(row, "db").level == BAD

    def test_an_unreachable_database_is_a_finding_too(self, run):
        url = f"postgresql://app:{SECRET}@127.0.0.1:1/app"

        done = run("doctor", "--database-url", url)

        assert done.exit_code == 3
        assert "✗ connection" in done.output
        assert "app:***@127.0.0.1:1" in done.output
        assert SECRET not in done.output

    @pytest.mark.parametrize(
        "malformed", [f"postgresql://app:{SECRET}@host:port/app", f"mysql://app:{SECRET}@host/app"]
    )
    def test_a_malformed_url_is_a_usage_error(self, run, malformed):
        done = run("doctor", "--database-url", malformed)

        assert (done.exit_code, SECRET in done.output) == (2, False)

    @pytest.fixture
    def as_role(self, engine) -> Iterator[tuple[str, str]]:
        """A role with no rights: its name, and the database's URL for it."""
        role = f"{engine.url.database}_app"
        with engine.begin() as connection:
            connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN PASSWORD '{SECRET}'")
        yield role, engine.url.set(username=role, password=SECRET).render_as_string(hide_password=False)
        with engine.begin() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {role}; DROP ROLE {role}")

    @pytest.mark.as_owner("the role is the test's own")
    def test_what_this_role_may_not_see_stops_nothing_else(self, run, as_role):
        told = self.findings(run, "--database-url", as_role[1])

        assert "could not be checked: permission denied" in told["tables"]["text"]
        assert told["notifications"]["level"] == OK

    @pytest.mark.parametrize(
        ("script", "subject", "cure"),
        [
            ("", "rights", "GRANT SELECT, INSERT, UPDATE, DELETE ON public.apoq_tasks TO {role}"),
            (
                f"GRANT SELECT {TABLES}",
                "rights",
                "GRANT INSERT, UPDATE, DELETE ON public.apoq_tasks TO {role}",
            ),
            ("REVOKE USAGE ON SCHEMA public FROM PUBLIC", "schema", "GRANT USAGE ON SCHEMA public TO {role}"),
            (
                f"GRANT ALL {TABLES}; ALTER ROLE {{role}} SET default_transaction_read_only = on",
                "read-only",
                "ALTER ROLE {role} RESET default_transaction_read_only",
            ),
            (
                f"GRANT ALL {TABLES}; ALTER TABLE apoq_tasks ENABLE ROW LEVEL SECURITY",
                "row security",
                "CREATE POLICY apoq_worker ON public.apoq_tasks TO {role} USING (true)",
            ),
            (
                f"CREATE TABLE child () INHERITS (apoq_tasks); GRANT ALL {TABLES}",
                "table",
                "ALTER TABLE child NO INHERIT public.apoq_tasks",
            ),
        ],
        ids=["no right at all", "SELECT alone", "no schema", "read-only", "row security", "inherited"],
    )
    @pytest.mark.as_owner("the role is the test's own")
    def test_what_keeps_a_role_from_working_is_to_be_mended(
        self, run, engine, as_role, script, subject, cure
    ):
        role, url = as_role
        with engine.begin() as connection:
            connection.exec_driver_sql(script.format(role=role) or "SELECT")

        done = run("doctor", "--database-url", url)
        found = json.loads(run("doctor", "--json", "--database-url", url).stdout)

        assert done.exit_code == 1
        cures = [each["cure"] for each in found if (each["subject"], each["level"]) == (subject, BAD)]
        assert [each for each in cures if each.startswith(cure.format(role=role))]
        assert [each["subject"] for each in found if each["level"] == BAD] == [subject] * len(cures)

    @pytest.mark.as_owner("the role is the test's own")
    def test_a_role_that_only_adds_tasks_is_worth_a_look(self, run, engine, as_role):
        role, url = as_role
        with engine.begin() as connection:
            connection.exec_driver_sql(
                f"GRANT INSERT, SELECT ON apoq_tasks TO {role}; GRANT SELECT ON apoq_migrations TO {role};"
                f"GRANT USAGE ON SEQUENCE apoq_tasks_id_seq TO {role}"
            )

        done = run("doctor", "--database-url", url)

        assert done.exit_code == 0, done.output
        told = self.findings(run, "--database-url", url)["rights"]
        assert (told["level"], told["text"]) == (WARNING, "this role can add tasks, but not run them")
        assert f"GRANT UPDATE, DELETE ON public.apoq_tasks TO {role};" in told["cure"]

    def test_where_there_are_no_tables_no_rights_are_missed(self, run, empty_url):
        told = self.findings(run, "--database-url", empty_url.render_as_string(hide_password=False))

        assert "rights" not in told


def test_the_name_of_a_prepared_transaction_is_quoted_in_what_is_to_be_pasted(monkeypatch):
    monkeypatch.setattr(table_checks, "LONG_TRANSACTION", timedelta())
    with PostgreSQL(settings={"max_prepared_transactions": "1"}) as server:
        engine = sa.create_engine(server.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with engine.connect() as connection:
            connection.exec_driver_sql(
                "BEGIN; CREATE TABLE t (); PREPARE TRANSACTION 'x''; DROP TABLE t; --'"
            )

            (finding,) = table_checks.check_horizon(connection)

            assert finding.cure == "COMMIT PREPARED or ROLLBACK PREPARED 'x''; DROP TABLE t; --'"
            connection.exec_driver_sql(finding.cure.removeprefix("COMMIT PREPARED or "))


@pytest.mark.slow
class TestDemo:
    def demo(self, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "apoq", "demo", "--tasks", "200"]
        return subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
        )

    def test_it_shows_exactly_once_and_ends_by_itself(self):
        done = self.demo(DATABASE_URL="postgresql://nobody@nowhere/nothing")

        assert done.returncode == 0, done.stderr
        assert "200 tasks added and rolled back:  0 are there" in done.stdout
        assert "is killed" in done.stdout
        assert "200 payments to 200 people" in done.stdout

    def test_without_the_package_it_says_what_to_install(self, tmp_path):
        done = self.demo(APOQ_PG_BINDIR=str(tmp_path))

        assert done.returncode == 1
        assert "the demo needs a private PostgreSQL server" in done.stderr
        assert "Traceback" not in done.stderr
