"""Dependent tasks: a large group, a long chain, and pairs."""

from __future__ import annotations

import time

from sqlalchemy.orm import Session

from benchmarks.features.laboratory import Crew, Figure, Laboratory, rate

CREW = Crew({"plain": 0.0, "member": 0.0, "last": 0.0, "link": 0.0, "parent": 0.0, "child": 0.0})


def group(laboratory: Laboratory) -> list[Figure]:
    """Run a group of 100,000 tasks, and the task after it."""
    laboratory.clear()
    count = laboratory.size(100_000, 1_000)
    with Session(laboratory.engine) as session, session.begin():
        began = time.monotonic()
        with laboratory.queue.group(session) as members:
            members.add_many("member", list(range(count)))
            members.then("last", 0)
        added_in = time.monotonic() - began
    laboratory.settle()
    runs = laboratory.run(CREW, wait_for={"member": count, "last": 1})
    members_ended = max(run.ended for run in runs if run.type == "member")
    last = [run for run in runs if run.type == "last"]
    took = last[0].started - min(run.started for run in runs)
    return [
        Figure(f"adding a group of {count:,}", added_in, "s"),
        Figure("from its first start to the last task", took, "s"),
        Figure("from its last end to the last task", last[0].started - members_ended, "s"),
        Figure("runs of the last task", len(last), "", "1"),
    ]


def chain(laboratory: Laboratory) -> list[Figure]:
    """Run a chain of 10,000 tasks, each of which waits for the one before."""
    laboratory.clear()
    count = laboratory.size(10_000, 200)
    with Session(laboratory.engine) as session, session.begin():
        before: list[int] = []
        for number in range(count):
            before = [laboratory.queue.add(session, "link", number, after=before).id]
    laboratory.settle()
    runs = laboratory.run(CREW, wait_for={"link": count})
    return [Figure(f"a chain of {count:,}", rate(runs), "tasks/s")]


def pairs(laboratory: Laboratory) -> list[Figure]:
    """Run parents that have a child each, and as many plain tasks."""
    count = laboratory.size(20_000, 500)
    laboratory.clear()
    laboratory.add("plain", range(2 * count))
    laboratory.settle()
    plain = rate(laboratory.run(CREW, wait_for={"plain": 2 * count}))
    laboratory.clear()
    with Session(laboratory.engine) as session, session.begin():
        for number in range(count):
            parent = laboratory.queue.add(session, "parent", number)
            laboratory.queue.add(session, "child", number, after=[parent])
    laboratory.settle()
    paired = rate(laboratory.run(CREW, wait_for={"parent": count, "child": count}))
    return [
        Figure("plain tasks", plain, "tasks/s"),
        Figure("parents with a child each", paired, "tasks/s"),
        Figure("parents and children / plain", paired / plain, "times"),
    ]
