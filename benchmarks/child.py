"""A process of the benchmark: ``python -m benchmarks.child ROLE TASK``.

It communicates in lines of JSON on its standard streams: it reports that it is ready, waits for "go", and
ends when its standard input is closed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from array import array
from pathlib import Path
from typing import Any

from benchmarks.contender import Contender, Work, WorkerStats
from benchmarks.contenders import contender


def say(**words: Any) -> None:
    print(json.dumps(words), flush=True)


def go() -> float:
    """Report that the process is ready, and wait for "go"; return the time at which it came."""
    say(ready=True)
    if not sys.stdin.readline():
        os._exit(1)
    return time.monotonic()


def memory(process: int | str = "self") -> float:
    """Return the resident memory of a process, by default this one, in MB."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def prepare(one: Contender) -> None:
    one.prepare()
    say(done=True)


def enqueue_each(one: Contender, *, first: int, count: int, interval: float, path: str) -> None:
    """Add one task per transaction, as fast as possible or every `interval` seconds; record each commit."""
    committed = array("d", bytes(8 * count))
    warm = min(20, count // 4)

    async def run() -> None:
        await one.connect()
        for number in range(warm):  # prepares statements and fills caches
            await one.add(first + number)
        began = go()
        due = began
        for number in range(warm, count):
            if interval:
                due = max(due + interval, time.monotonic())
                await asyncio.sleep(due - time.monotonic())
            await one.add(first + number)
            committed[number] = time.monotonic()
        say(seconds=time.monotonic() - began, count=count - warm)
        await one.close()

    one.run(run())
    if path:
        Path(path).write_bytes(committed.tobytes())
    say(done=True)


def enqueue_bulk(one: Contender, *, first: int, count: int, portion: int = 0, step: int = 1) -> None:
    """Add many tasks, in one call or in portions; their numbers are `step` apart."""
    portion = portion or count
    numbers = range(first, first + count * step, step)

    async def run() -> None:
        await one.connect()
        began = go()
        for start in range(0, count, portion):
            await one.add_many(numbers[start : start + portion])
        say(seconds=time.monotonic() - began)
        await one.close()

    one.run(run())


def enqueue_rate(
    one: Contender, *, first: int, rate: float, seconds: float, interval: float, path: str
) -> None:
    """Add tasks at a rate, in a batch every `interval` seconds; record each commit."""
    total = int(rate * seconds)
    committed = array("d", bytes(8 * total))

    async def run() -> None:
        await one.connect()
        began = go()
        added = 0
        due = began
        while added < total:
            due += interval
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            until = min(total, int((time.monotonic() - began) * rate))
            if until > added:
                await one.add_many(range(first + added, first + until))
                now = time.monotonic()
                for number in range(added, until):
                    committed[number] = now
                added = until
        say(seconds=time.monotonic() - began)
        await one.close()

    one.run(run())
    Path(path).write_bytes(committed.tobytes())
    say(done=True)


def enqueue_steady(
    one: Contender, *, first: int, warm: int, rate: float, batch: int, seconds: float, path: str
) -> None:
    """Add batches at fixed times, without waiting for the queue; record each commit, and how late it began.

    A batch is one transaction. The first `warm` batches are added before the start and not recorded.
    """
    batches = warm + round(rate * seconds / batch)
    committed = array("d", bytes(8 * batches * batch))
    late = array("d")

    async def add(which: int) -> None:
        number = first + which * batch
        await (one.add(number) if batch == 1 else one.add_many(range(number, number + batch)))

    async def run() -> None:
        await one.connect()
        for which in range(warm):
            await add(which)
        began, cpu = go(), time.process_time()
        for which in range(warm, batches):
            due = began + (which - warm + 1) * batch / rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            late.append(time.monotonic() - due)
            await add(which)
            now = time.monotonic()
            for number in range(which * batch, (which + 1) * batch):
                committed[number] = now
        cpu = time.process_time() - cpu
        say(seconds=time.monotonic() - began, cpu=cpu, late=list(late))
        await one.close()

    one.run(run())
    Path(path).write_bytes(committed.tobytes())
    say(done=True)


def clients(one: Contender, *, first: int, threads: int, seconds: float, most: int, path: str) -> None:
    """Add tasks from many threads for some seconds, each task in its own transaction; record each commit."""
    counts = [0] * threads
    committed = array("d", bytes(8 * threads * most))
    begin = threading.Barrier(threads + 1)

    async def client(which: int) -> None:
        mine = await one.another()
        at = which * most
        await mine.add(first + at)
        counts[which] = 1
        begin.wait()
        end = time.monotonic() + seconds
        while time.monotonic() < end and counts[which] < most:
            number = at + counts[which]
            await mine.add(first + number)
            committed[number] = time.monotonic()
            counts[which] += 1

    one.run(one.connect())
    running = [
        threading.Thread(target=lambda which=which: one.run(client(which))) for which in range(threads)
    ]
    for thread in running:
        thread.start()
    while begin.n_waiting < threads:
        time.sleep(0.01)
    began = go()
    begin.wait()
    for thread in running:
        thread.join()
    say(counts=counts, seconds=time.monotonic() - began)
    Path(path).write_bytes(committed.tobytes())
    say(done=True)


def work(one: Contender, *, capacity: int, path: str, **options: Any) -> None:
    """Run tasks until "stop" is received; meanwhile, report the progress on request."""
    if one.worker_program:
        words = [*one.worker_program, one.url, str(capacity), path, json.dumps(options)]
        os.execvp(words[0], words)  # noqa: S606 - no shell is needed
    todo = Work(WorkerStats(capacity), threading.Event(), **options)
    began = go()
    threading.Thread(target=_respond, args=(todo, began, path), daemon=True).start()
    one.work(todo)
    _write(todo, path)


def _write(todo: Work, path: str) -> None:
    count = todo.stats.count
    with Path(path).open("wb") as file:
        for column in (todo.stats.numbers, todo.stats.started, todo.stats.took):
            column[:count].tofile(file)
    say(count=count)


def _respond(todo: Work, began: float, path: str) -> None:
    for line in sys.stdin:
        if line == "count\n":
            say(count=todo.stats.count, now=time.monotonic())
        elif line == "report\n":
            count, cpu = todo.stats.count, time.process_time()
            say(count=count, now=time.monotonic(), began=began, cpu=cpu, memory=memory())
        elif line == "stop\n":
            todo.stop.set()
        elif line == "leave\n":  # all tasks are finished, and the time of a graceful stop isn't measured
            _write(todo, path)
            os._exit(0)
    if not todo.stop.is_set():
        os._exit(1)  # the parent process is gone


def add_times(one: Contender, *, count: int) -> None:
    """Time `add` in transactions that also do other work."""
    import sqlalchemy as sa

    from apoq import Queue, Task, database_url
    from benchmarks.baselines import time_adds
    from benchmarks.contender import TYPE, document

    queue = Queue()
    engine = sa.create_engine(database_url(one.url))

    def add(session: Any, number: int) -> None:
        queue.add(session, TYPE, document(number))

    def orm(session: Any, number: int) -> None:
        session.add(Task(type=TYPE, data=document(number)))
        session.flush()

    chosen = {"apoq": add, "plain ORM": orm}[one.name]
    time_adds(engine, chosen, 50)
    go()
    say(took=time_adds(engine, chosen, count))


def loop(one: Contender, *, count: int, threads: int) -> None:
    """Do the work of a processor without a queue: open a session, insert, commit."""
    numbers = iter(range(count))

    async def run() -> None:
        for number in numbers:
            await one.add(number)

    asyncio.run(one.connect())
    running = [threading.Thread(target=lambda: asyncio.run(run())) for _ in range(threads)]
    began = go()
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    say(seconds=time.monotonic() - began)


ROLES = (prepare, enqueue_each, enqueue_bulk, enqueue_rate, enqueue_steady, clients, work, add_times, loop)


def main(role: str, task: dict[str, Any]) -> None:
    one = contender(task.pop("contender"))(task.pop("url"), notify=task.pop("notify", False))
    next(function for function in ROLES if function.__name__ == role)(one, **task)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
