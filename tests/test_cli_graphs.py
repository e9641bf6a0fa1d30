"""What the command line shows of graphs and groups."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from sqlalchemy.orm import Session
from test_graphs import run_failing_graph, set_up

from apoq import Queue, Task
from apoq.cli import main

QUEUE = Queue()


@pytest.fixture
def apoq(url):
    def run(*words: str, exit_code: int = 0) -> str:
        environment = {"DATABASE_URL": url.render_as_string(hide_password=False), "COLUMNS": "120"}
        result = CliRunner().invoke(main, words, env=environment)
        assert result.exit_code == exit_code, result.output
        return result.output

    return run


@pytest.fixture
def graph(engine, worker) -> list[int]:
    return run_failing_graph(engine, worker, QUEUE)


def test_show_draws_the_tasks_around_a_task(apoq, graph):
    bad, held, left, right = graph

    shown = apoq("show", str(held))

    assert [line.strip("│├└─ ") for line in shown.splitlines() if "─ " in line] == [
        f"after {bad} fail failed  parent {bad} (fail) failed",
        f"{held} t waiting (parents)  (this task)",
        f"{left} t waiting",
        f"{right} t waiting  (see above)",
        f"{right} t waiting",
    ]
    assert "waits for      1 task " in shown


def test_show_draws_a_bounded_part_of_a_graph(apoq, engine):
    with Session(engine) as session, session.begin():
        root = QUEUE.add(session, "t")
        QUEUE.add_many(session, "t", [{}] * 50, after=[root])
        last = root
        for _ in range(12):
            last = QUEUE.add(session, "t", after=[last])
        root_id = root.id

    shown = apoq("show", str(root_id))

    assert "… and 31 more" in shown
    assert len(shown.splitlines()) < 100


def test_a_plain_task_has_no_graph(apoq, engine):
    with Session(engine) as session, session.begin():
        id_ = QUEUE.add(session, "t").id

    assert "graph" not in apoq("show", str(id_))


def test_groups_are_listed_with_the_states_of_their_tasks(apoq, engine, worker):
    set_up(worker, [])
    with Session(engine) as session, session.begin():
        for name, types in (("first", ["t", "t", "fail"]), ("second", ["later"])):
            with QUEUE.group(session, name=name) as group:
                for type_ in types:
                    group.add(type_, {"n": 1})
                group.then("t", {"n": 2})
    while worker.work():
        pass

    rows = [json.loads(line) for line in apoq("groups", "--json").splitlines()]

    assert [(row["name"], row["state"], row["tasks"]) for row in rows] == [
        ("second", "waiting", {"pending": 1}),
        ("first", "cancelled", {"completed": 2, "failed": 1}),
    ]
    assert "2 completed, 1 failed" in apoq("groups")
    assert "first" not in apoq("groups", "--limit", "1")


def test_without_groups_it_says_so(apoq):
    assert "There are no groups." in apoq("groups")


def test_doctor_names_tasks_that_wait_for_others_that_do_not_complete(apoq, engine, graph):
    bad, held, *_ = graph
    with Session(engine) as session, session.begin():
        gone = QUEUE.add(session, "t", {"n": 1})
        QUEUE.add(session, "t", after=[gone], on_parent_failure="hold")
        session.execute(sa.delete(Task).where(Task.id == gone.id))
        late = QUEUE.add(session, "unknown")
        session.execute(
            sa.update(Task).where(Task.id == late.id).values(process_at=sa.func.now() - timedelta(hours=1))
        )
        QUEUE.add(session, "t", after=[late])

    found = [
        each["text"]
        for each in json.loads(apoq("doctor", "--json", exit_code=1))
        if each["subject"] == "waiting"
    ]

    failed = f"1 task in 'default' waits for others that have failed, such as task {held} for task {bad}"
    assert any(text.startswith(failed) for text in found)
    assert any("that were deleted" in text for text in found)
    assert any("no live worker works" in text for text in found)
