"""The methods of a queue for chains and groups."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Iterator, Mapping
from typing import Any, Unpack, overload

from apoq.client.dependencies import Part, chain
from apoq.client.groups import Group
from apoq.client.queue_base import QueueBase
from apoq.client.session_adapters import AsyncioSession, SyncSession, through
from apoq.client.session_first import session_first
from apoq.client.typed_task import Call
from apoq.core.dependencies import Dependencies, checked_dependencies, checked_on_failure
from apoq.core.limits import ConcurrencyKey, key_for
from apoq.core.options import Options, checked, merged_options
from apoq.core.payload import check_name, check_type, encode
from apoq.errors import InvalidTask, glimpse
from apoq.schema.models import Task
from apoq.schema.statements.links import GROUP_NAME
from apoq.tracing import with_trace


class QueueGraphs(QueueBase):
    """The chains and groups of a queue."""

    @overload
    def chain(self, session: SyncSession, /, *calls: Call[...], **options: Unpack[Options]) -> list[Task]: ...
    @overload
    def chain(
        self, session: AsyncioSession, /, *calls: Call[...], **options: Unpack[Options]
    ) -> Coroutine[Any, Any, list[Task]]: ...
    @session_first
    def chain(
        self, session: SyncSession | AsyncioSession, /, *calls: Call[...], **options: Unpack[Options]
    ) -> list[Task] | Coroutine[Any, Any, list[Task]]:
        """Add tasks of which each waits until the one before has completed.

        Args:
            session: A session or connection, as for `add`.
            *calls: Calls of typed tasks, made by `TypedTask.call`.
            **options: Options of these tasks, as for `add`, without a unique key. `delay`, `process_at` and
                `after` are the first one's.

        Returns:
            The tasks, in this order. With an asyncio session or connection, an awaitable of them.

        Raises:
            InvalidTask: If there are no calls, or an argument is invalid. Nothing was sent.
            UnsupportedSession: If `session` is not a session or connection, or has no usable engine.
            UnsupportedDatabase: If it is not on PostgreSQL through psycopg 3, or translates apoq's schema.
            SchemaMismatch: If apoq's tables are missing or at another version.
        """
        if not calls:
            raise InvalidTask("chain must be given calls, such as a_task.call(1), got none")
        parameters, dependencies, key = self._part(options)
        parts = [self._written(_checked_call(call), None, key) for call in calls]
        on_failure = checked_on_failure(options.get("on_parent_failure"))
        return through(
            session,
            lambda caller: chain(caller, self.schema, parameters, parts, dependencies, on_failure),
        )

    def group(self, session: SyncSession | AsyncioSession, *, name: str = "group") -> Group:
        """Add tasks as a group, and tasks that run after all of them.

            with queue.group(session, name="import 7") as group:
                group.add_many(import_row.call(row) for row in rows)
                group.then(finish.call(7))
                group.always(clean_up.call(7))

        Args:
            session: A session or connection, as for `add`. Use ``async with`` if it is asyncio's.
            name: A name for people, which ``apoq groups`` shows.

        Returns:
            A `Group`. When the block ends, the tasks of `then` and `always` are added. If the group has no
            tasks, they are due at once.

        Raises:
            InvalidTask: If the name is invalid, or the block ends without a task that runs after the group.
            UnsupportedSession: If `session` is not a session or connection, or has no usable engine.
            UnsupportedDatabase: If it is not on PostgreSQL through psycopg 3, or translates apoq's schema.
            SchemaMismatch: If apoq's tables are missing or at another version.
        """
        return Group(self, session, check_name(name, "a group's name"))

    def _member(
        self, task: Call[...] | str, data: Any, options: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Dependencies]:
        options = _with_own_options(task, options)
        parameters, dependencies, key = self._part(options)
        on_failure = checked_on_failure(options.get("on_parent_failure"))
        part = self._written(task, data, key)
        return {**parameters, **part.parameters}, dependencies or Dependencies((), on_failure)

    def _members(
        self, task: Any, items: Iterable[Any] | None, options: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Iterator[Part]]:
        parameters, dependencies, key = self._part(options)
        if dependencies is not None:
            raise InvalidTask("after must not be given to add_many of a group: add each task by `add`")
        if isinstance(task, str):
            if isinstance(items, str | bytes | dict) or not isinstance(items, Iterable):
                raise InvalidTask(
                    f"items must be the data of many tasks, such as a list of dicts, got {glimpse(items)}"
                )
            check_type(task)
            return parameters, (self._written(task, item, key) for item in items)
        if items is not None or not isinstance(task, Iterable):
            raise InvalidTask(
                f"add_many must be given calls of typed tasks, or a type and items, got {glimpse(task)}"
            )
        return parameters, (self._written(_checked_call(call), None, key) for call in task)

    def _closing(
        self,
        task: Call[...] | str,
        data: Any,
        options: Mapping[str, Any],
        on_failure: object,
        name: str,
    ) -> dict[str, Any]:
        checked_on_failure(on_failure)
        options = _with_own_options(task, options)
        parameters, dependencies, key = self._part(options)
        if dependencies is not None:
            raise InvalidTask("after must not be given to `then` or `always`, which wait for the group")
        meta = {**(options.get("meta") or {}), GROUP_NAME: name}
        parameters |= self._written(task, data, key).parameters
        return with_trace({**parameters, "task_meta": encode(meta)})

    def _part(
        self, options: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Dependencies | None, ConcurrencyKey | None]:
        """Return the checked options of a part of a graph as parameters, its parents, and its key."""
        for name in options.keys() - Options.__annotations__:
            raise TypeError(f"there is no option {name!r} of a task")
        plain = dict(options)
        after, on_failure = plain.pop("after", ()), plain.pop("on_parent_failure", None)
        key = plain.pop("key", None)
        for name in ("unique_key", "unique_until", "on_conflict", "debounce", "max_wait", "throttle"):
            if plain.pop(name, None) is not None:
                raise InvalidTask(f"{name} can't be given in a chain or a group: add such a task by `add`")
        dependencies = checked_dependencies(after, on_failure, self._parent_id)
        return {"task_queue": self.name, **with_trace(checked(**plain))}, dependencies, key

    def _written(self, task: Call[...] | str, data: Any, key: ConcurrencyKey | None) -> Part:
        """Return the type, the document and the concurrency key of a call, or of a type and its data."""
        if not isinstance(task, Call):
            value = {} if data is None else data
            return Part(check_type(task), encode(value, self.max_data_size), key_for(key, value))
        if data is not None:
            raise InvalidTask(
                f"data must not be given with a call, which has its arguments, got {glimpse(data)}"
            )
        own = self._key_of(task, None) if key is None else key_for(key, task.data)
        return Part(task.type, encode(task.data, self.max_data_size), own)


def _checked_call(call: object) -> Call[...]:
    if not isinstance(call, Call):
        raise InvalidTask(
            f"a call of a typed task must be given, such as a_task.call(1), got {glimpse(call)}"
        )
    own = sorted(name for name, value in call.options.items() if value is not None and name != "key")
    if own:
        raise InvalidTask(
            "the calls of a chain, and of add_many of a group, must have no options of their own, got "
            f"{', '.join(own)} of {call.type!r}: give an option for all of them, or add the task by `add`"
        )
    return call


def _with_own_options(task: object, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options that are given with a task, and those of its call that they don't override."""
    given: Any = dict(options)
    return merged_options(task.options, given) if isinstance(task, Call) else given
