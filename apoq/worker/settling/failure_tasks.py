"""Adds the tasks that `on_failure` asks for, in the transaction that marks other tasks as failed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from sqlalchemy import Executable

from apoq.core.failures import FollowUp, TaskFailure
from apoq.core.limits import key_for
from apoq.core.options import has_expiry
from apoq.core.outcomes import report
from apoq.core.payload import encode
from apoq.core.states import FAILED
from apoq.errors import ApoqError
from apoq.schema.statements.enqueue import enqueue_many
from apoq.worker import logs
from apoq.worker.execution.runner import AttemptResult


class Send(Protocol):
    """Executes one statement of the transaction."""

    def __call__(self, statement: Executable, parameters: Mapping[str, Any], /) -> object:
        """Execute it."""


def has_failure_task(end: AttemptResult) -> bool:
    """Return whether a task is added if this result is written."""
    return (
        end.settlement is not None
        and end.settlement.state == FAILED
        and end.attempt.processor.on_failure is not None
    )


def add_failure_tasks(send: Send, schema: str | None, ends: Iterable[AttemptResult]) -> set[str]:
    """Add the tasks of these results; return the names of their queues."""
    added: dict[tuple[int, str, str | None], tuple[FollowUp, list[str]]] = {}
    for end in ends:
        follow, queue = end.attempt.processor.on_failure, end.attempt.from_queue.name
        if follow is None:
            continue
        try:
            data = follow.data(_failure(end))
            document, key = encode(data), key_for(follow.key, data)
        except ApoqError as error:  # an annotation that is still unknown, for example
            logs.failure_task_not_added([end.attempt.id], error)
        else:
            its = added.setdefault((id(follow), follow.queue or queue, key), (follow, []))
            its[1].append(document)
    for (_, queue, key), (follow, documents) in added.items():
        parameters = {
            "task_queue": queue,
            "task_type": follow.type,
            "task_key": key,
            "task_data": "\n".join(documents),
        }
        statement = enqueue_many(schema, expires=has_expiry(follow.parameters))
        send(statement, {**parameters, **follow.parameters})
    return {queue for _, queue, _ in added}


def _failure(end: AttemptResult) -> TaskFailure:
    attempt, settlement = end.attempt, end.settlement
    error = settlement.error if settlement is not None else None
    if error is None and end.outcome is not None:
        error = report(end.outcome)
    return TaskFailure(
        task_id=attempt.id,
        type=attempt.type,
        queue=attempt.from_queue.name,
        attempt=attempt.number if settlement is None else settlement.attempt,
        error_class=(error or {}).get("class", ""),
        message=(error or {}).get("message", ""),
    )
