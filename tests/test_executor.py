"""The threads on which coroutines call plain functions."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from apoq.worker.execution.daemon_threads import MOST_THREADS, DaemonExecutor

SOON = 30.0


@pytest.fixture
def executor() -> Iterator[DaemonExecutor]:
    executor = DaemonExecutor()
    yield executor
    executor.shutdown()


def test_it_returns_and_raises_what_a_function_does(executor):
    assert executor.submit(divmod, 7, 2).result(SOON) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        executor.submit(divmod, 7, 0).result(SOON)


def test_calls_run_at_the_same_time_and_others_wait_for_a_thread(executor):
    met, may_end = threading.Barrier(MOST_THREADS + 1), threading.Event()

    def wait() -> None:
        met.wait(SOON)
        may_end.wait(SOON)

    running = [executor.submit(wait) for _ in range(MOST_THREADS)]
    waiting = executor.submit(int)
    met.wait(SOON)

    assert not waiting.running()
    may_end.set()
    assert waiting.result(SOON) == 0
    assert all(each.result(SOON) is None for each in running)


def test_a_thread_that_is_idle_is_used_again(executor):
    threads = {executor.submit(threading.get_ident).result(SOON) for _ in range(20)}

    assert len(threads) <= 2  # a result may be there before its thread is idle


def test_a_call_that_is_cancelled_while_it_waits_is_not_made(executor):
    may_end, called = threading.Event(), threading.Event()
    for _ in range(MOST_THREADS):
        executor.submit(may_end.wait, SOON)
    cancelled, last = executor.submit(called.set), executor.submit(int)

    assert cancelled.cancel()
    may_end.set()

    assert last.result(SOON) == 0
    assert not called.is_set()


def test_its_threads_end_when_it_is_shut_down():
    executor = DaemonExecutor()
    thread = executor.submit(threading.current_thread).result(SOON)

    executor.shutdown()
    thread.join(SOON)

    assert not thread.is_alive()


def test_an_event_loop_takes_it(executor):
    async def main() -> str:
        asyncio.get_running_loop().set_default_executor(executor)
        return (await asyncio.to_thread(threading.current_thread)).name

    assert asyncio.run(main()).startswith("apoq-executor-")


PROGRAM = """
import threading
from apoq.worker.execution.daemon_threads import DaemonExecutor
begun = threading.Event()
DaemonExecutor().submit(lambda: (begun.set(), threading.Event().wait()))
begun.wait()
"""


def test_a_call_that_goes_on_does_not_hold_up_the_end_of_the_program():
    assert subprocess.run([sys.executable, "-c", PROGRAM], check=False, timeout=SOON).returncode == 0
