"""The application context in which a task is processed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from contextvars import copy_context

from flask import Flask

from apoq.worker import AsyncRunningTask, RunningTask


def context_for(app: Flask, task: RunningTask | AsyncRunningTask) -> AbstractContextManager[object]:
    """Answer a new application context, whose end is that of the application's sessions."""
    return app.app_context() if isinstance(task, RunningTask) else _context_on_a_loop(app)


@contextmanager
def _context_on_a_loop(app: Flask) -> Iterator[None]:
    """Be in an application context on a thread that runs an event loop, but end it on another thread.

    An application may have coroutine functions among those that it calls at the end of a context, as
    Flask-SQLAlchemy-Lite does. Flask runs them on a loop of their own, which a thread with a loop can't.
    """
    apart, context = copy_context(), app.app_context()
    apart.run(context.push)
    here = copy_context()
    tokens = [
        (variable, variable.set(value))
        for variable, value in apart.items()
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
                popped = thread.submit(apart.run, context.pop, error)
            except RuntimeError:
                # The system allows no more threads. Only coroutine functions among those need one.
                apart.run(context.pop, error)
            else:
                popped.result()
