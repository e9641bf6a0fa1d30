"""The command line's view of schedules: the list, the actions, and what doctor finds."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.metadata import version

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result
from sqlalchemy.orm import Session
from ticking import tick_at

from apoq import Queue, Schedule, Task, prepare
from apoq.cli import main
from apoq.schema.tables import WorkerRow

DEPLOYED = datetime(2026, 5, 4, tzinfo=UTC)


@pytest.fixture
def run(engine, monkeypatch) -> Callable[..., Result]:
    monkeypatch.setenv("APOQ_DATABASE_URL", engine.url.render_as_string(hide_password=False))

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["schedules", *arguments])

    return call


@pytest.fixture
def doctor(engine, monkeypatch) -> Callable[[], list[dict[str, str]]]:
    monkeypatch.setenv("APOQ_DATABASE_URL", engine.url.render_as_string(hide_password=False))

    def call() -> list[dict[str, str]]:
        found = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
        return [finding for finding in found if finding["subject"] == "schedules"]

    return call


@pytest.fixture
def add(engine) -> Callable[..., None]:
    def call(name: str, queue: str = "default", **columns: object) -> None:
        with Session(engine) as session, session.begin():
            Queue(queue).schedule(session, name, "t", {"a": 1}, cron="0 9 1 1 *", timezone="Europe/Berlin")
            if columns:
                session.execute(sa.update(Schedule).where(Schedule.name == name).values(columns))

    return call


@pytest.fixture
def enlist(engine) -> Callable[..., None]:
    """Enter a live worker."""

    def call(*queues: str, release: datetime | None = None) -> None:
        with engine.begin() as connection:
            now = sa.func.clock_timestamp()
            connection.execute(
                sa.insert(WorkerRow).values(
                    id=sa.func.gen_random_uuid(),
                    host="web1",
                    pid=7,
                    version=version("apoq"),
                    queues=list(queues or ["default"]),
                    concurrency=4,
                    expires_at=now + timedelta(minutes=1),
                    grace=timedelta(seconds=5),
                    release=release,
                )
            )

    return call


def load(engine: sa.Engine) -> dict[str, Schedule]:
    with Session(engine) as session:
        return {its.name: its for its in session.scalars(sa.select(Schedule))}


def test_nothing_is_listed_if_there_is_none(run):
    assert run().stdout == "No schedules.\n"


def test_the_list_has_the_times_and_what_was_skipped(run, add, enlist):
    now = datetime.now(UTC)
    add("yearly", next_at=now + timedelta(days=3), last_tick_at=now - timedelta(hours=5), skipped_count=1_234)
    add("paused", paused_at=now - timedelta(minutes=9))
    add("quick", cron=None, every=timedelta(minutes=5))
    enlist()

    lines = run().stdout.splitlines()

    assert lines[0].split() == ["name", "times", "next", "last", "skipped", "state"]
    paused, quick, yearly = (line.split() for line in lines[2:])
    assert yearly == [
        "yearly",
        "0",
        "9",
        "1",
        "1",
        "*",
        "Europe/Berlin",
        "in",
        "3",
        "d",
        "5",
        "h",
        "ago",
        "1,234",
    ]
    assert " ".join(paused).endswith("0 paused 9 min ago")
    assert quick[:4] == ["quick", "every", "5", "min"]


def test_the_list_as_json(run, add):
    add("yearly", "others", meta={"a": 1})

    (row,) = map(json.loads, run("--json").stdout.splitlines())

    assert (row["queue"], row["name"], row["type"], row["data"]) == ("others", "yearly", "t", {"a": 1})
    assert (row["cron"], row["timezone"], row["every"]) == ("0 9 1 1 *", "Europe/Berlin", None)
    assert (row["is_orphan"], row["is_worked"], row["last_state"]) == (False, False, None)
    assert row["next_at"].endswith("+00:00")


def test_the_list_is_bounded_and_can_be_of_one_queue(run, add):
    for queue in ("a", "b"):
        add("same", queue)

    assert "raise --limit" in run("--limit", "1").stderr
    assert run("--queue", "a").stdout.count("same") == 1
    assert run("--queue", "c").stdout == "No schedules.\n"


def test_a_schedule_is_an_orphan_if_live_code_is_newer_than_its_declaration(run, add, enlist):
    add("lost", origin="code", release=DEPLOYED)
    add("mine", origin="added")
    assert "orphan" not in run().stdout
    enlist(release=DEPLOYED + timedelta(days=1))

    assert [line.split()[0] for line in run().stdout.splitlines() if "orphan" in line] == ["lost"]

    enlist(release=DEPLOYED)  # an old worker, which still declares it
    assert "orphan" not in run().stdout


def test_pausing_and_resuming(run, add, engine):
    add("digest")

    assert run("pause", "digest").stdout == "Paused the schedule 'digest'.\n"
    assert load(engine)["digest"].paused_at is not None
    assert run("pause", "digest").stdout == "The schedule 'digest' is paused already.\n"
    assert run("resume", "digest").stdout == "Resumed the schedule 'digest'.\n"
    assert load(engine)["digest"].paused_at is None
    assert run("resume", "digest").stdout == "The schedule 'digest' is not paused.\n"


def test_running_a_paused_schedule_now(run, add, engine):
    add("digest", paused_at=sa.func.now(), priority=3)
    before = load(engine)["digest"]

    output = run("run-now", "digest").stdout

    with Session(engine) as session:
        task = session.scalars(sa.select(Task)).one()
    assert output == f"Added task {task.id}.\n"
    assert (task.type, task.data, task.schedule, task.priority) == ("t", {"a": 1}, "digest", 3)
    assert task.tick_at == task.process_at == task.created_at
    after = load(engine)["digest"]
    assert (after.next_at, after.last_tick_at, after.last_task_id) == (before.next_at, None, None)


def test_a_task_is_shown_with_its_schedule(run, add):
    add("digest-7")
    task_id = run("run-now", "digest-7").stdout.split()[2].rstrip(".")

    lines = CliRunner().invoke(main, ["show", task_id]).stdout.splitlines()

    assert ["schedule", "digest-7"] in [line.split() for line in lines]
    assert any(line.startswith("tick ") for line in lines)


def test_a_task_of_run_now_does_not_block_the_next_tick(run, add, engine):
    add("digest")
    run("run-now", "digest")

    with engine.begin() as connection:
        tick_at(connection, load(engine)["digest"].next_at)

    assert load(engine)["digest"].skipped_count == 0


def test_removing_a_schedule(run, add, engine):
    add("digest")
    run("run-now", "digest")

    assert run("remove", "digest").stdout == "Removed the schedule 'digest'; its tasks stay.\n"

    assert load(engine) == {}
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(Task)) == 1


def test_an_action_as_json(run, add):
    add("digest")

    assert json.loads(run("pause", "digest", "--json").stdout) == {
        "queue": "default",
        "name": "digest",
        "changed": True,
    }


@pytest.mark.parametrize("action", ["pause", "resume", "run-now", "remove"])
def test_an_action_needs_one_schedule(run, add, action):
    result = run(action, "digest")
    assert result.exit_code == 1
    assert "there is no schedule 'digest'" in result.stderr

    add("digest", "a")
    add("digest", "b")
    result = run(action, "digest")
    assert result.exit_code == 1
    assert "the queues a, b have a schedule 'digest': choose one by --queue" in result.stderr
    assert run("run-now", "digest", "--queue", "b").exit_code == 0

    result = run(action)
    assert result.exit_code == 2
    assert f"schedules {action} NAME" in result.stderr


def test_schedules_of_another_schema(run, engine):
    prepare(engine, schema="other")
    with Session(engine) as session, session.begin():
        Queue(schema="other").schedule(session, "digest", "t", every=60)

    assert "digest" in run("--schema", "other").stdout
    assert run("run-now", "digest", "--schema", "other").exit_code == 0


def test_doctor_says_nothing_of_schedules_if_there_are_none_and_is_content_with_good_ones(
    doctor, add, enlist
):
    assert doctor() == []

    add("digest")
    enlist()

    (found,) = doctor()
    assert (found["level"], found["text"]) == ("ok", "1, all of which tick")


def test_doctor_names_what_is_wrong(doctor, add, enlist, engine):
    now = datetime.now(UTC)
    add("unknown type")
    with engine.begin() as connection:
        tick_at(connection, load(engine)["unknown type"].next_at)
        connection.execute(sa.update(Task).values(process_at=now - timedelta(minutes=5)))
    add("late", next_at=now - timedelta(minutes=10))
    add("nobody's", "others")
    enlist()
    add("lost", origin="code", release=DEPLOYED)
    with engine.begin() as connection:
        connection.execute(sa.update(WorkerRow).values(release=now))

    found = doctor()

    assert {finding["level"] for finding in found} == {"warning"}
    texts = [finding["text"] for finding in found]
    assert texts == [
        "'late' of queue 'default' should have ticked 10 min ago",
        "'lost' of queue 'default' is not declared by the code of any live worker, but still adds tasks",
        "'unknown type' of queue 'default' has a task of type 't' that has been due for 5 min",
        "1 more have such problems",
    ]
    assert found[1]["cure"] == "apoq schedules remove lost"
    assert "start one that has" in found[2]["cure"]
