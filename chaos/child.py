"""A process of the suite: ``python -m chaos.child ROLE TASK``. It ends when its standard input is closed."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import random
import signal
import struct
import sys
import threading
import time
from array import array
from collections.abc import Callable
from datetime import timedelta
from itertools import cycle
from pathlib import Path
from typing import Any, Final, SupportsIndex

import sqlalchemy as sa
from sqlalchemy.orm import Session

from apoq import Fail, Limit, Queue, Retry, RunningTask, Snooze, Worker
from chaos.watcher import MAX_OF_KEY

TICK = 0.05
"""Seconds between the transactions of an enqueuing process."""

KEYS = 40
"""The number of concurrency keys of the tasks."""

LEDGER = sa.text("INSERT INTO ledger (number) VALUES (:number)")
PARENTS = sa.text("SELECT count(DISTINCT number) FROM ledger WHERE number = ANY (:numbers)")
EARLY = sa.text("INSERT INTO early (number) VALUES (:number)")


def noop(_task: RunningTask) -> None:
    pass


def keyed(_task: RunningTask) -> None:
    """Of a type of which two tasks of each key may run at once."""


def key_of(data: dict[str, int]) -> int:
    return data["number"] // 3 % KEYS


LOAD: Final = (("ledger", None), ("noop", None), ("keyed", key_of))
"""The types of the tasks that are added in turn, and their keys."""


def ledger(task: RunningTask) -> None:
    """Write a row that must be written exactly once."""
    task.session.execute(LEDGER, {"number": task.data["number"]})


def linked(task: RunningTask) -> None:
    """Do the same, and record it if the row of a parent isn't there yet."""
    parents = task.data["parents"]
    rows = task.session.scalar(PARENTS, {"numbers": parents})
    if rows != len(parents):
        task.session.execute(EARLY, {"number": task.data["number"]})
    ledger(task)


PLACED_EVENT: Final = "<qqd?"
"""The format of an event in the files of `placed`: key, task, time, and whether the attempt has ended."""


ENDS: Final[list[Callable[[], Exception] | None]] = [
    lambda: Snooze(0.02),
    lambda: Retry("again", delay=0.01),
    ValueError,
    *[None] * 47,
]
"""How the attempts of `placed` end: most of them complete."""


def placed_into(folder: str) -> Callable[[RunningTask], None]:
    """Return a processor that notes in a file when its attempts begin and end, and often fails."""
    # Written at once, without a buffer, because the process may be killed.
    file = Path(folder, f"placed-{os.getpid()}").open("ab", buffering=0)  # noqa: SIM115 - open to the end

    def note(task: RunningTask, *, is_end: bool) -> None:
        file.write(struct.pack(PLACED_EVENT, task.data["key"], task.id, time.monotonic(), is_end))

    def placed(task: RunningTask) -> None:
        note(task, is_end=False)
        try:
            time.sleep(random.choice((0.0, 0.0, 0.0, 0.0, 0.01)))  # noqa: S311 - no secret
            if error := random.choice(ENDS):  # noqa: S311 - no secret
                raise error()
        finally:
            note(task, is_end=True)

    return placed


def fails(task: RunningTask) -> None:
    raise Fail(f"as it should: {task.data['number']}")


def sleep(seconds: float | SupportsIndex, /) -> None:
    threading.Event().wait(float(seconds))


def work(
    url: str,
    direct: str | None,
    folder: str,
    schemas: list[str | None],
    environment: dict[str, str] | None = None,
    lease: float | None = None,
    retry_limit: int | None = None,
) -> None:
    """Run a worker as in a user's own program, with only the settings that the README asks for.

    That is none, except behind PgBouncer: then `direct` is a URL that leads past it. A scenario may set more.
    """
    if environment:
        if "LD_PRELOAD" not in os.environ:
            # A library can be preloaded only when a program starts.
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **environment})  # noqa: S606
        time.sleep = sleep  # under libfaketime, time.sleep sometimes fails: [Errno 22] Invalid argument

    def hold(task: RunningTask) -> None:
        """Occupy a slot until a file exists, then write a row."""
        released = Path(folder, f"release-{task.data['number']}")
        while not released.exists():
            time.sleep(0.1)
        ledger(task)

    engine = sa.create_engine(url, connect_args={"prepare_threshold": None} if direct else {})
    queues = [Queue(schema=schema) for schema in schemas]
    options: dict[str, Any] = {} if lease is None else {"lease": timedelta(seconds=lease)}
    worker = Worker(engine, *queues, concurrency=4, listen_url=direct, **options)
    limit: dict[str, Any] = {} if retry_limit is None else {"retry_limit": retry_limit}
    for processor in (noop, ledger, hold, linked, fails):
        worker.use(processor.__name__, processor, **limit)
    of_key = Limit(MAX_OF_KEY, key=True)
    worker.use("keyed", keyed, limit=of_key, **limit)
    worker.use("placed", placed_into(folder), limit=of_key, retry_limit=1_000, retry_delay=0.01)
    threading.Thread(target=_exit_with_input, daemon=True).start()
    worker.run()
    logging.getLogger(__name__).info("the worker has stopped")


def offer(
    url: str, first: int, rate: float, folder: str, schemas: list[str | None], settings: str = ""
) -> None:
    """Add tasks at a rate until a line is received; errors don't stop it.

    A number is recorded as sure if its commit was confirmed, and as unsure if the outcome of the commit is
    unknown. A task that can't be added is dropped, not added later, as the clients of a website that is down
    go away as well.
    """
    arguments = {"application_name": "offerer", "options": settings}
    engine = sa.create_engine(url, connect_args=arguments)
    queues = cycle([Queue(schema=schema) for schema in schemas])
    sure, unsure = array("q"), array("q")
    stopped = threading.Event()
    threading.Thread(target=_stop_by_input, args=(stopped,), daemon=True).start()
    print(json.dumps({"ready": True}), flush=True)
    number, due = first, time.monotonic()
    while not stopped.is_set():
        due = max(due + TICK, time.monotonic() - 1)
        time.sleep(max(0.0, due - time.monotonic()))
        until = number + max(1, round(rate * TICK))
        is_committing = False
        queue = next(queues)
        try:
            with Session(engine) as session:
                for place, (type_, key) in enumerate(LOAD):
                    items = [{"number": n} for n in range(number, until) if n % 3 == place]
                    if items:
                        queue.add_many(session, type_, items, key=key)
                session.flush()
                is_committing = True
                session.commit()
            sure.extend(range(number, until))
        except Exception as error:  # noqa: BLE001 - the process goes on after any error
            logging.getLogger(__name__).info("could not add, committing=%s: %s", is_committing, error)
            if is_committing:
                unsure.extend(range(number, until))
            time.sleep(0.1)
            due = time.monotonic()
        number = until
    for name, numbers in (("sure", sure), ("unsure", unsure)):
        Path(folder, f"{name}-{first}").write_bytes(numbers.tobytes())
    print(json.dumps({"sure": len(sure), "unsure": len(unsure)}), flush=True)


def _exit_with_input() -> None:
    sys.stdin.read()
    os._exit(1)


def _stop_by_input(stopped: threading.Event) -> None:
    sys.stdin.readline()
    stopped.set()


def main(role: str, log: str, **task: Any) -> None:
    logging.basicConfig(
        filename=log,
        level=logging.INFO,
        format="%(asctime)s.%(msecs)03d %(levelname)s %(message)s",
        datefmt="%X",
    )
    faulthandler.register(signal.SIGUSR1, Path(f"{log}.stacks").open("w"))  # noqa: SIM115 - open to the end
    roles: dict[str, Callable[..., None]] = {"work": work, "offer": offer}
    roles[role](**task)


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
