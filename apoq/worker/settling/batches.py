"""The results of attempts in batches that one statement can write."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import groupby
from operator import itemgetter
from typing import Any, Final, NamedTuple, TypeVar

from apoq.core.payload import encode
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.claim import CLAIM, CLAIM_TOKEN, ID
from apoq.worker.execution.attempt import Claim, Claimed
from apoq.worker.execution.runner import AttemptResult

T = TypeVar("T")


class Unsettled(NamedTuple):
    """Results in one schema, and the method that writes them."""

    write: Callable[[Unsettled], list[Any]]
    """Returns those that it has left out, because another session has locked their tasks."""
    schema: str | None
    ended: list[Any]
    """Claimed rows of completed tasks, or else `AttemptResult`."""
    skips_locked: bool = False
    """Whether locked tasks are left out, instead of waiting for them."""
    looks_at: float = 0.0
    """When those that were left out are tried again."""
    has_results: bool = False
    """Whether the processors of these completed tasks have returned a value that is stored."""
    is_linked: bool = False
    """Whether other tasks may wait for these, so that their edges are written as well."""


class Closed(NamedTuple):
    """A schema whose whole table is locked."""

    until: float
    pause: float


id_and_token: Final[Callable[[Claimed], tuple[int, int]]] = itemgetter(ID, CLAIM_TOKEN)
"""The same task may be in a batch twice, if it was claimed again after the worker had lost it."""

claim_of: Final[Callable[[Claimed], Claim]] = itemgetter(CLAIM)


def row_of(one: Claimed | AttemptResult) -> Claimed:
    """Return the claimed row of something that has ended."""
    return one.attempt.row if isinstance(one, AttemptResult) else one


def taken(ended: deque[T]) -> list[T]:
    """Take what is in this now, while others add to it."""
    return [ended.popleft() for _ in range(len(ended))]


def in_parts(batch: Iterable[T], claim_of: Callable[[T], Claim]) -> list[tuple[str | None, list[T]]]:
    """Part what ended into lists that one statement can write, each with its schema."""
    parts: dict[str | None, list[T]] = {}
    # By claim, of which hundreds of tasks in a row are.
    for claim, its in groupby(batch, claim_of):
        parts.setdefault(claim.from_queue.schema, []).extend(its)
    return list(parts.items())


def token_arrays(tasks: Iterable[Claimed]) -> dict[str, Any]:
    """Return the tokens of tasks as a parameter of `settle` and the like."""
    return {"tokens": array_text([task[CLAIM_TOKEN] for task in tasks])}


def settlement_arrays(ends: list[AttemptResult]) -> dict[str, list[Any]]:
    """Return the settlements as parameters of `settle`."""
    settlements = [end.settlement for end in ends if end.settlement is not None]
    return {
        "states": [settlement.state for settlement in settlements],
        "attempts": [settlement.attempt for settlement in settlements],
        "fail_counts": [settlement.fail_count for settlement in settlements],
        "delays": [settlement.delay for settlement in settlements],
        "errors": [
            None if settlement.error is None else encode(settlement.error) for settlement in settlements
        ],
    }
