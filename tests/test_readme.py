"""The README says what is so."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from types import ModuleType

import sqlalchemy as sa

from apoq import Task, Worker

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_its_python_runs(empty_url, monkeypatch):
    monkeypatch.setenv(
        "DATABASE_URL", empty_url.set(drivername="postgresql").render_as_string(hide_password=False)
    )
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    done = threading.Semaphore(0)
    started = []

    class Watched(Worker):
        def start(self, **options) -> None:
            self.events.on("task.completed", lambda task: done.release())
            started.append(self)
            super().start(**options)

    monkeypatch.setattr("apoq.Worker", Watched)
    module = ModuleType("app")  # by which the annotations of typed tasks are resolved
    monkeypatch.setitem(sys.modules, "app", module)

    exec(compile(code, "README.md", "exec", dont_inherit=True), vars(module))
    for _ in range(101):
        assert done.acquire(timeout=10)
    engine = module.engine
    with engine.connect() as connection:
        states = sa.select(Task.type, Task.state, sa.func.count()).group_by(Task.type, Task.state)
        found = sorted(map(tuple, connection.execute(states)))
    started[0].stop()
    engine.dispose()

    assert found == [("app.book", "completed", 1), ("app.send_welcome", "completed", 100)]
