"""The typed tasks that equal queues of a process share.

A module that adds tasks and a module that runs a worker may each write ``Queue("emails")``. Both mean the
same queue, so a worker of the one also runs the typed tasks that were defined on the other.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakSet, WeakValueDictionary

from apoq.client.typed_task import TypedTask
from apoq.core.limits import Limit
from apoq.core.registry import Registry
from apoq.errors import InvalidLimit

AnyTypedTask = TypedTask[..., Any]


class SharedTasks:
    """The typed tasks of all queues with the same name and schema, and the registries of their workers.

    The tasks are kept alive by the queue that they were defined on.
    """

    def __init__(self) -> None:
        self.by_type: WeakValueDictionary[str, AnyTypedTask] = WeakValueDictionary()
        self.registries: WeakSet[Registry] = WeakSet()
        self.limit: Limit | None = None

    def set_limit(self, limit: Limit | None, queue: str) -> None:
        """Set the limit of the queue; `InvalidLimit` if another object has set another one."""
        if limit is not None and self.limit not in {None, limit}:
            raise InvalidLimit(f"{queue} must have one limit, got {limit} and, before, {self.limit}")
        self.limit = limit or self.limit

    def conflict(self, type_: str, task: AnyTypedTask) -> AnyTypedTask | None:
        """Return the task of this type if it is another function.

        The same function may be defined again, as by a reload or an application factory.
        """
        if self._has_other(type_, task):
            gc.collect()  # a task that is no longer in use is part of a cycle, and may still be there
        return self.by_type.get(type_) if self._has_other(type_, task) else None

    def _has_other(self, type_: str, task: AnyTypedTask) -> bool:
        found = self.by_type.get(type_)
        return found is not None and _place(found.function) != _place(task.function)


def _place(function: Callable[..., Any]) -> tuple[object, object]:
    """Return what is equal for two definitions of the same function."""
    name = getattr(function, "__qualname__", "<lambda>")
    if name.endswith("<lambda>"):
        return None, getattr(function, "__code__", function)
    return function.__module__, name


_lock = threading.Lock()
_by_queue: WeakValueDictionary[tuple[str, str | None], SharedTasks] = WeakValueDictionary()


def shared_tasks(name: str, schema: str | None) -> SharedTasks:
    """Return what the queues with this name and schema share; each of them keeps it alive."""
    with _lock:
        return _by_queue.setdefault((name, schema), SharedTasks())
