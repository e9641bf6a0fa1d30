"""The README says what is so."""

from __future__ import annotations

import threading

import sqlalchemy as sa

from apoq import Task, Worker


def test_its_python_runs(empty_url, monkeypatch, run_page):
    monkeypatch.setenv(
        "DATABASE_URL", empty_url.set(drivername="postgresql").render_as_string(hide_password=False)
    )
    done = threading.Semaphore(0)
    started = []

    class Watched(Worker):
        def start(self, **options) -> None:
            self.events.on("task.completed", lambda task: done.release())
            started.append(self)
            super().start(**options)

        def run(self) -> None:
            self.start()  # which goes on

    monkeypatch.setattr("apoq.Worker", Watched)

    namespace = run_page("../README.md", "app")
    for _ in range(101):
        assert done.acquire(timeout=10)
    engine = namespace["engine"]
    with engine.connect() as connection:
        states = sa.select(Task.type, Task.state, sa.func.count()).group_by(Task.type, Task.state)
        found = sorted(map(tuple, connection.execute(states)))
    started[0].stop()
    engine.dispose()

    assert found == [("app.book", "completed", 1), ("app.send_welcome", "completed", 100)]
