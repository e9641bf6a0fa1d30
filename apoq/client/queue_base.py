"""The name, the schema and the typed tasks of a queue, which all operations on queues use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any
from weakref import WeakSet

from apoq.client.shared_tasks import shared_tasks
from apoq.client.task_ids import task_id
from apoq.client.typed_task import Call, TypedTask
from apoq.core.limits import Limit, checked_key, key_for, whole_limit
from apoq.core.options import HIGHEST_LIMIT, integer
from apoq.core.payload import MAX_DATA_SIZE, check_name, check_schema
from apoq.core.registry import Registry
from apoq.errors import InvalidProcessor
from apoq.schema.models import DEFAULT_QUEUE, Task, task_class


class QueueBase:
    """The base of the classes that `Queue` is made of: each of them has the methods for one subject."""

    def __init__(
        self,
        name: str = DEFAULT_QUEUE,
        *,
        schema: str | None = None,
        max_data_size: int = MAX_DATA_SIZE,
        limit: Limit | None = None,
    ) -> None:
        """Create a queue. Nothing is written to the database.

        Args:
            name: The queue's name, of at most 255 characters.
            schema: The schema of apoq's tables. By default the connection's search_path chooses it.
            max_data_size: The limit of a task's data, in bytes of JSON: 1 MiB by default.
            limit: How many tasks of the queue may run at once, over all workers: a `Limit` without a key.

        Raises:
            InvalidTask: If an argument is invalid.
            InvalidLimit: If the limit has a key, or another `Queue` of this name has a different one.
        """
        self.name = check_name(name, "a queue's name")
        self.schema = check_schema(schema)
        self.max_data_size = integer("max_data_size", max_data_size, 1, HIGHEST_LIMIT)
        self._tasks: dict[str, TypedTask[..., Any]] = {}
        self._declared: list[TypedTask[..., Any]] = []
        self._registries: WeakSet[Registry] = WeakSet()
        self._shared = shared_tasks(self.name, self.schema)
        self._shared.set_limit(whole_limit(limit), repr(self))

    def __repr__(self) -> str:
        schema = "" if self.schema is None else f", schema={self.schema!r}"
        return f"Queue({self.name!r}{schema})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QueueBase) and (self.name, self.schema) == (other.name, other.schema)

    def __hash__(self) -> int:
        return hash((self.name, self.schema))

    @property
    def limited_to(self) -> Limit | None:
        """How many tasks of the queue may run at once, as the code declares it."""
        return self._shared.limit

    @property
    def task_class(self) -> type[Task]:
        """The mapped class of this queue's tasks: `apoq.Task`, or a subclass if the queue has a schema."""
        return task_class(self.schema)

    @property
    def tasks(self) -> Mapping[str, TypedTask[..., Any]]:
        """The typed tasks of this queue, and of the queues that are equal to it, by type and alias."""
        return MappingProxyType({**self._shared.by_type, **self._tasks})

    def scheduled_tasks(self) -> Iterator[TypedTask[..., Any]]:
        """Yield the typed tasks that have a schedule, for the workers of this queue."""
        for type_, task in self.tasks.items():
            if task.schedule and type_ == task.type:  # and not one of its aliases
                yield task
        yield from self._declared

    def declare(self, task: TypedTask[..., Any]) -> None:
        """Let workers of this queue declare the schedule of a task whose processor they have already."""
        self._declared.append(task)

    def register_in(self, registry: Registry) -> None:
        """Add the typed tasks of this queue to a worker's registry, and those that are defined later."""
        for type_, task in self.tasks.items():
            registry.put(self, type_, task.processor)
        self._registries.add(registry)
        self._shared.registries.add(registry)

    def adopt(self, task: TypedTask[..., Any]) -> None:
        """Let workers of this queue run a task that was defined on another one; see `TypedTask.to`."""
        found = self.tasks.get(task.type)
        if found is None or found.function is not task.function:
            self._register(task)

    def _register(self, task: TypedTask[..., Any]) -> None:
        """Let workers run a task that was defined on this queue; `InvalidProcessor` if its type is taken."""
        types, registries = dict.fromkeys((task.type, *task.aliases)), tuple(self._shared.registries)
        for type_ in types:
            if found := self._tasks.get(type_) or self._shared.conflict(type_, task):
                raise InvalidProcessor(
                    f"the type {type_!r} already has a processor, {found.function!r}: choose another type by "
                    f"{self!r}.task(type=…)"
                )
        again = {type_ for type_ in types if type_ in self._shared.by_type}
        for registry in registries:
            registry.check_results(task.type, task.processor)
            for type_ in types.keys() - again:
                registry.check_free(self, type_)
        for type_ in types:
            self._tasks[type_] = self._shared.by_type[type_] = task
            for registry in registries:
                if type_ not in again:
                    registry.put(self, type_, task.processor)
                elif registry in self._registries:
                    # Of a function that was defined again, a worker of this very queue runs this queue's.
                    registry.put(self, type_, task.processor, replaces=True)

    def _key_of(self, call: Call[Any] | str, key: str | int | None) -> str | None:
        # By the call and not by its type, because a Flask application's queue doesn't have its typed tasks.
        if key is None and isinstance(call, Call):
            return key_for(call.options.get("key"), call.data)
        return checked_key(key)

    def _id_of(self, task: Task | int | None) -> int:
        return task_id(self, task)

    def _parent_id(self, task: Any) -> int:
        return task_id(self, task, "each task in after")
