"""Find what ``module:object`` names, and make a worker of it."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import reduce
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from sqlalchemy.engine import url

from apoq.cli.exits import BadUsage, Failure
from apoq.client.queue import Queue
from apoq.errors import ApoqError
from apoq.postgres.urls import UNREADABLE, without_password
from apoq.worker import Worker

_OURS = str(Path(__file__).parent)
WANTED = "a Worker, a Queue, or a function that answers one"


def load(name: str, make: Callable[[Queue], Worker]) -> Worker:
    """Answer the worker that ``module:object`` names; of a queue, `make` makes one.

    The current directory is importable, as for flask and uvicorn.
    """
    module_name, colon, path = name.partition(":")
    if not (module_name and colon and path):
        raise BadUsage(f"{name!r} names no object: write it as module:object, such as myapp.tasks:worker")
    module = _import(module_name)
    with located(f"{name} can't be read"):
        found = _find(module, path, name)
        if isinstance(queue := getattr(found, "queue", None), Queue):
            raise BadUsage(f"{name} is a task of {queue!r}: give the queue instead")
    if callable(found) and not isinstance(found, Worker | Queue):
        with located(f"{name} failed"):
            found = found()
    match found:
        case Worker():
            return found
        case Queue():
            return make(found)
        case Coroutine():
            found.close()
            raise BadUsage(f"{name} is a coroutine function: give a plain one, or {WANTED}")
        case _:
            raise BadUsage(f"{name} is of type {type(found).__qualname__}, and not {WANTED}")


def _import(name: str) -> ModuleType:
    try:
        here = str(Path.cwd())
    except OSError as error:
        raise BadUsage(f"the current directory, in which modules are looked for, is gone: {error}") from None
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        with located(f"{name} can't be imported"):
            return import_module(name)
    except Failure as failure:
        missing = failure.__cause__
        if isinstance(missing, ModuleNotFoundError) and f"{name}.".startswith(f"{missing.name}."):
            raise BadUsage(
                f"there is no module {missing.name!r}, neither in {here} nor among what is installed"
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
    """Say what was raised in the user's code, and where."""
    try:
        yield
    except (Failure, ApoqError):
        raise  # it says what is wrong
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # such as SystemExit: it isn't for what is imported to end the program
        raise BadUsage(f"{what}: {_message(error)}{_where(error)}") from error


def _message(error: BaseException) -> str:
    if traceback.extract_tb(error.__traceback__)[-1].filename == url.__file__:
        return UNREADABLE  # SQLAlchemy's own words may have a part of the password in them
    (*_, last) = traceback.format_exception_only(error)
    return without_password(" ".join(last.split()))


def _where(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f" ({error.filename}, line {error.lineno})"
    # The innermost place of the user's own: that of a library says little.
    libraries = (*(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")), "<", _OURS)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
