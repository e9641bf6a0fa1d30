"""Load what ``module:object`` names, and make a worker of it."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from sqlalchemy.engine import url

from apoq.cli.exits import BadUsage, Failure
from apoq.client.queue import Queue
from apoq.client.typed_task import TypedTask
from apoq.errors import ApoqError
from apoq.postgres.urls import UNREADABLE, without_password
from apoq.worker import Worker

_OURS = str(Path(__file__).parent)
WANTED = "a Worker, a Queue, or a function that returns one of these"


def load(names: Sequence[str], make: Callable[[Sequence[Queue]], Worker]) -> Worker:
    """Return the worker that ``module:object`` names; for one or more queues, `make` makes it.

    The current directory is importable, as it is for flask and uvicorn.
    """
    found = [(name, _load(name)) for name in names]
    queues: list[Queue] = []
    for name, each in found:
        if isinstance(each, Worker):
            if len(found) > 1:
                raise BadUsage(
                    f"{name} is a Worker, which has its own queues: give it alone, or give only queues"
                )
            return each
        queues.append(each)
    return make(queues)


def _load(name: str) -> Worker | Queue:
    module_name, colon, path = name.partition(":")
    if not (module_name and colon and path):
        raise BadUsage(f"must be module:object, such as myapp.tasks:worker, got {name!r}")
    module = _import(module_name)
    with located(f"{name} can't be read"):
        found = _find(module, path, name)
        if isinstance(found, TypedTask) and not isinstance(found.queue, Queue):
            raise BadUsage(f"{name} is a task of a Flask application: run `flask apoq worker` instead")
        if isinstance(queue := getattr(found, "queue", None), Queue):
            raise BadUsage(f"{name} is a task of {queue!r}: give that queue instead")
    if callable(found) and not isinstance(found, Worker | Queue):
        with located(f"{name} failed"):
            found = found()
    match found:
        case Worker() | Queue():
            return found
        case Coroutine():
            found.close()
            raise BadUsage(f"{name} must be {WANTED}, got a coroutine function: make it a plain function")
        case _:
            raise BadUsage(f"{name} must be {WANTED}, got an object of type {type(found).__qualname__}")


def _import(name: str) -> ModuleType:
    try:
        here = str(Path.cwd())
    except OSError as error:
        raise BadUsage(
            f"the current directory doesn't exist any more: {error}: change to another one"
        ) from None
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        with located(f"{name} can't be imported"):
            return import_module(name)
    except Failure as failure:
        missing = failure.__cause__
        if isinstance(missing, ModuleNotFoundError) and f"{name}.".startswith(f"{missing.name}."):
            raise BadUsage(
                f"there is no module {missing.name!r}, neither in {here} nor among the installed packages"
            ) from None
        raise


def _find(module: ModuleType, path: str, name: str) -> Any:
    try:
        return reduce(getattr, path.split("."), module)
    except AttributeError:
        usable = [key for key, value in vars(module).items() if isinstance(value, Worker | Queue)]
        there = f"; there is {', '.join(usable)}" if usable else ""
        raise BadUsage(f"{name}: the module {module.__name__!r} has no {path!r}{there}") from None


@contextmanager
def located(what: str) -> Iterator[None]:
    """Turn an error in the user's code into one line that says what was raised, and where."""
    try:
        yield
    except (Failure, ApoqError):
        raise  # its message says what is wrong
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # such as SystemExit: an imported module must not end the program
        raise BadUsage(f"{what}: {_message(error)}{_where(error)}") from error


def _message(error: BaseException) -> str:
    if traceback.extract_tb(error.__traceback__)[-1].filename == url.__file__:
        return UNREADABLE  # SQLAlchemy's message may contain a part of the password
    (*_, last) = traceback.format_exception_only(error)
    return without_password(" ".join(last.split()))


def _where(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f" ({error.filename}, line {error.lineno})"
    # The innermost line of the user's own code: that of a library says little.
    libraries = (*(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")), "<", _OURS)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
