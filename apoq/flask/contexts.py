"""The application context in which a processor runs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from contextvars import copy_context

from flask import Flask

from apoq.worker import AsyncRunningTask, RunningTask


def context_for(app: Flask, task: RunningTask | AsyncRunningTask) -> AbstractContextManager[object]:
    """Return a new application context, at whose end the application's sessions are closed."""
    return app.app_context() if isinstance(task, RunningTask) else _context_on_a_loop(app)


@contextmanager
def _context_on_a_loop(app: Flask) -> Iterator[None]:
    """Enter an application context on a thread that runs an event loop, and exit it on another thread.

    An application may have teardown functions that are coroutine functions, as Flask-SQLAlchemy-Lite has.
    Flask runs them on a new event loop, which isn't possible on a thread that already runs one.
    """
    isolated, context = copy_context(), app.app_context()
    isolated.run(context.push)
    here = copy_context()
    tokens = [
        (variable, variable.set(value))
        for variable, value in isolated.items()
        if here.get(variable) is not value
    ]
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        for variable, token in tokens:
            variable.reset(token)
        with ThreadPoolExecutor(1, thread_name_prefix="apoq-teardown") as thread:
            try:
                popped = thread.submit(isolated.run, context.pop, error)
            except RuntimeError:
                # The system allows no more threads. Plain teardown functions need none.
                isolated.run(context.pop, error)
            else:
                popped.result()
