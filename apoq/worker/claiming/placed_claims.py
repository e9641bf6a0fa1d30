"""Claims under limits: transactions that give places to tasks, and let the others wait."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Final, NamedTuple
from zlib import crc32

from psycopg import DatabaseError
from psycopg.errors import UniqueViolation
from sqlalchemy import Engine

from apoq.core.places import (
    KEY,
    POOL,
    WHOLE_QUEUE,
    Blocked,
    Candidate,
    Decision,
    Order,
    Placed,
    Rule,
    Rules,
    Share,
    State,
    decide,
)
from apoq.postgres.connections import (
    STATEMENT_TIMEOUT_SECONDS,
    Sent,
    Transaction,
    execute,
    is_caused_by_a_row,
    transaction,
)
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.claim import ID, PRIORITY, PROCESS_AT
from apoq.schema.statements.levels import level_of
from apoq.schema.statements.limits import limits_of
from apoq.schema.statements.places import (
    LOCKS,
    awaited_shares,
    block,
    first_of_keys,
    held_places,
    lock_shares,
    pick_blocked,
    pick_due,
    pick_first,
    take,
    unblock,
)
from apoq.worker import logs
from apoq.worker.claiming.claim_statement import ClaimStatement, Row
from apoq.worker.claiming.claimable_queue import ClaimableQueue
from apoq.worker.claiming.queue_claims import MAX_REFUSED
from apoq.worker.places import Freed, Places

MAX_KEYS: Final = 256
"""Keys to which one claim gives places, at most, and due tasks that it looks at."""

MAX_PICKED: Final = 100
"""Due tasks that a claim looks at if most of the last ones had to be blocked.

More at once would be blocked sooner, but hold up the tasks of other keys for longer.
"""

MAX_REMEMBERED: Final = 10_000
"""Keys that are remembered to have a single place, at most."""

NOTHING: Final = Decision([], [], [], set())

_PLACE_INDEXES: Final = ("apoq_tasks_places_idx", "apoq_tasks_pools_idx")


class PlacedTasks(NamedTuple):
    """The result of a claim under limits."""

    number: int
    """Of the claim."""
    sent_at: float
    """When it was sent, by time.monotonic()."""
    rows: list[Row]
    """The tasks that were taken, in order."""
    ends: Mapping[int, tuple[float, int]]
    """For each level, the position up to which all tasks were taken or blocked."""
    has_more: bool
    """Whether there may be more due tasks to take."""
    later: Freed
    """Places to look at again: another transaction was giving them away, or there may be more tasks."""
    blocked: int = 0
    """How many tasks have to wait for places from now on."""
    is_unblocked: bool = False
    """Whether tasks are pending again that other workers may claim."""


class PlacedClaims:
    """Claims tasks of a schema that need places, or that come after such tasks in a queue with limits."""

    def __init__(self, engine: Engine, schema: str | None, statement: ClaimStatement, places: Places) -> None:
        self._engine = engine
        self._schema = schema
        self._statement = statement
        self._places = places
        self._blocked: dict[ClaimableQueue, float] = {}
        """The fraction of the due tasks that the last claim of each queue had to block."""
        self._types: dict[ClaimableQueue, frozenset[str]] = {}
        """The types from which to claim next, because the queue is full and they have limits of their own."""
        self._serial: set[Share] = set()
        """Keys and pools that were found to have a single place."""
        self._rarely_awaited: set[ClaimableQueue] = set()
        """The queues in which few tasks were waiting for the last places that became free."""

    def claim(self, queue: ClaimableQueue, limit: int, free: int) -> PlacedTasks:
        """Claim up to `limit` due tasks of a queue for `free` slots, and block those without a free place."""
        at_most = MAX_PICKED if self._blocked.get(queue, 0.0) > 1 / 2 else min(limit, MAX_KEYS)
        refused = 0
        while True:
            found: list[Candidate] = []
            try:
                return self._claim_due(queue, at_most, limit, free, found)
            except UniqueViolation as error:
                if error.diag.constraint_name not in _PLACE_INDEXES:
                    raise
                # Rolled back for certain. It happens only if two names of a schema are used, or two servers.
                self._places.conflicts += 1
                at_most = limit = max(1, limit // 2)
            except DatabaseError as error:
                if not is_caused_by_a_row(error):
                    raise
                if len(found) == 1:
                    refused += 1
                    if refused > MAX_REFUSED:
                        raise
                    logs.task_passed_over(found[0].id, queue.cursor.pass_over(found[0].id), error)
                elif at_most == 1:
                    raise
                at_most = max(1, at_most // 8)
                limit = min(limit, at_most)

    def _claim_due(
        self, queue: ClaimableQueue, at_most: int, limit: int, free: int, found: list[Candidate]
    ) -> PlacedTasks:
        """Claim due tasks; `found` gets those that it has looked at."""
        types = self._types.pop(queue, None)

        def pick(send: Transaction) -> tuple[list[Candidate], Decision]:
            # Rescued tasks must find a free slot. If not more are taken than there are, they all do.
            free_slots = free if limit > free else at_most
            form, parameters = self._statement.form_and_parameters(
                {queue: at_most}, at_most, free_slots, types
            )
            form |= {"keyed": queue.is_keyed}
            found[:] = _in_order(send(pick_due(self._schema, **form), parameters))
            return found, self._decide(send, queue, found, limit)

        number, rows, decision = self._transact(queue, pick, free)
        blocked = decision.blocked if decision else []
        left = decision.left if decision else []
        self._blocked[queue] = len(blocked) / max(1, len(found))
        full = decision.full if decision else set()
        is_queue_full = Share(POOL, WHOLE_QUEUE) in full
        has_others = is_queue_full and queue in self._types
        return PlacedTasks(
            number,
            self._statement.sent_at,
            rows,
            {} if types else _ends(found, {task.id for task in left}, is_keyed=queue.is_keyed),
            has_more=has_others or (not is_queue_full and (len(found) >= at_most or bool(left))),
            # A place may have become free while its tasks were blocked, and before that was committed.
            later=dict.fromkeys({each.share for each in blocked}, 1),
            blocked=len(blocked),
        )

    def hand_over(self, queue: ClaimableQueue, freed: Freed, room: int, free: int) -> PlacedTasks:
        """Give free places to the tasks that wait for them: claim up to `room`, and unblock the others."""
        shares = [share for share in freed if share != Share(POOL, WHOLE_QUEUE)]
        if shares and queue in self._rarely_awaited:
            shares = self._awaited_of(queue, shares)
        if not shares:
            return PlacedTasks(0, time.monotonic(), [], {}, has_more=False, later={})
        later: dict[Share, int] = {}
        unblocked: list[int] = []

        def pick(send: Transaction) -> tuple[list[Candidate], Decision]:
            # One more than have become free, because more places may be free than that.
            wanted = {share: 1 if share in self._serial else freed[share] + 1 for share in shares}
            parameters = self._wanted(queue, wanted)
            numbers = self._numbers(queue, shares)
            # The rest after the locks, so that no other transaction changes it.
            taken, picked, limits, places = send.together(
                _lock(numbers),
                (pick_blocked(self._schema), parameters),
                self._limits(queue, {share.name for share in shares if share.kind == KEY}),
                self._held(queue, shares),
            )
            locked, held = _locked(numbers, taken), _by_share(places)
            self._note_found(queue, picked.rowcount, shares)
            later.update({share: freed[share] for share in shares if share not in locked})
            for share in later:
                del wanted[share]
            found = _in_order(picked)
            keys = {task.key for task in found if task.key is not None}
            if not keys <= {share.name for share in shares if share.kind == KEY}:
                limits = send(*self._limits(queue, keys))  # of the keys of tasks that wait for their type
            rules = _rules(limits)
            first_ids, found = self._with_first(send, queue, rules, found, parameters)
            needed = {task.id: {share for share, _ in rules.shares_of(task)} for task in found}
            if others := sorted(set().union(*needed.values()).difference(shares)):
                numbers = self._numbers(queue, others)
                taken, places = send.together(_lock(numbers), self._held(queue, others))
                locked |= _locked(numbers, taken)
                held |= _by_share(places)
            self._remember_serial(rules, found, wanted)
            state = State(held, frozenset(locked), {}, first_ids)
            decision = decide([task._replace(may_run=True) for task in found], rules, state, len(found))
            runnable = {task.id for task in found if task.may_run}
            mine = [each for each in decision.placed if each.task.id in runnable][:room]
            ids = {each.task.id for each in mine}
            # The next of each key whose place is free, but not that of the queue: claims wait for that one.
            held_up = {task.awaited: task.id for task in reversed(decision.left) if needed[task.id] <= locked}
            unblocked[:] = [each.task.id for each in decision.placed if each.task.id not in ids]
            unblocked.extend(held_up.values())
            later.update({task.awaited: 1 for task in decision.left if not needed[task.id] <= locked})
            # Its own place is free, but that of its type isn't, or the other way around.
            moved = [each for each in decision.blocked if each.share.kind != each.task.waits_for]
            later.update({each.share: 1 for each in moved})
            later.update(_more(wanted, decision.placed, moved, self._serial))
            return found, Decision(mine, moved, decision.left, decision.full)

        try:
            number, rows, _ = self._transact(queue, pick, free, unblocked)
        except UniqueViolation as error:
            if error.diag.constraint_name not in _PLACE_INDEXES:
                raise
            self._places.conflicts += 1
            later = {share: freed[share] for share in shares}
            return PlacedTasks(0, time.monotonic(), [], {}, has_more=False, later=later)
        sent_at = self._statement.sent_at
        return PlacedTasks(
            number, sent_at, rows, {}, has_more=False, later=later, is_unblocked=bool(unblocked)
        )

    def _awaited_of(self, queue: ClaimableQueue, shares: list[Share]) -> list[Share]:
        """Return those of these keys and pools that tasks wait for, without locks.

        A task that another transaction is just about to let wait isn't found; after its commit, the worker
        that has sent it looks again.
        """
        found = list(_firsts(execute(self._engine, *self._awaited(queue, shares))))
        self._note_found(queue, len(found), shares)
        return found

    def _note_found(self, queue: ClaimableQueue, count: int, shares: Sequence[Share]) -> None:
        """Remember whether tasks were waiting for most of these keys and pools."""
        if 2 * count < len(shares):
            self._rarely_awaited.add(queue)
        else:
            self._rarely_awaited.discard(queue)

    def _transact(
        self,
        queue: ClaimableQueue,
        pick: Callable[[Transaction], tuple[list[Candidate], Decision]],
        free: int,
        unblocked: Sequence[int] = (),
    ) -> tuple[int, list[Row], Decision | None]:
        """Decide about tasks by `pick`, which also sets those to be `unblocked`, and write the decision."""
        decision: Decision | None = None

        def claim(parameters: dict[str, Any]) -> list[Row]:
            nonlocal decision
            with transaction(self._engine, timeout=STATEMENT_TIMEOUT_SECONDS) as send:
                candidates, decision = pick(send)
                if not candidates:
                    return []
                others: list[Sent] = []
                if decision.blocked:
                    others.append((block(self._schema), _blocked(decision.blocked)))
                if unblocked:
                    others.append((unblock(self._schema), {"ids": array_text(unblocked)}))
                if not decision.placed:
                    send.together(*others, commits=True)
                    return []
                taken = parameters | self._taken(queue, decision.placed, free)
                return self._statement.end_with(send, take, taken, *others)

        number, rows = self._statement.record(claim)
        if decision is not None and rows:
            self._places.hold(number, queue.queue, _shares(decision.placed))
        rows.sort(key=lambda row: (-row[PRIORITY], row[PROCESS_AT], row[ID]))
        return number, rows, decision

    def _taken(self, queue: ClaimableQueue, placed: Sequence[Placed], free: int) -> dict[str, Any]:
        """Return tasks with their places as parameters of `take`."""
        return {
            "ids": array_text(each.task.id for each in placed),
            "slots": [each.slot for each in placed],
            "pools": [each.pool for each in placed],
            "pool_slots": [each.pool_slot for each in placed],
            "is_ahead": len(placed) > free,
            "retry_limits": self._statement.retry_limits([queue]),
        }

    def _decide(
        self, send: Transaction, queue: ClaimableQueue, found: list[Candidate], room: int
    ) -> Decision:
        if not found:
            return NOTHING
        keys = list(dict.fromkeys(task.key for task in found if task.key is not None))
        pools = [WHOLE_QUEUE, *dict.fromkeys(task.type for task in found)]
        shares = [Share(KEY, key) for key in keys[:MAX_KEYS]] + [Share(POOL, name) for name in pools]
        full = self._full(send, queue, found, shares) if self._blocked.get(queue) else {}
        numbers = self._numbers(queue, [share for share in shares if share not in full])
        # The rest after the locks, so that no other transaction changes it.
        taken, limits, places, awaited = send.together(
            _lock(numbers), self._limits(queue, keys), self._held(queue, shares), self._awaited(queue, shares)
        )
        rules = _rules(limits)
        state = State(
            _by_share(places),
            frozenset(_locked(numbers, taken)),
            full | _firsts(awaited),
            self._first_ids(send, queue, rules, found),
        )
        decision = decide(found, rules, state, room)
        if Share(POOL, WHOLE_QUEUE) in decision.full and (
            limited := rules.limited_types & queue.processors.keys()
        ):
            self._types[queue] = limited
        return decision

    def _full(
        self, send: Transaction, queue: ClaimableQueue, found: list[Candidate], shares: list[Share]
    ) -> dict[Share, Order]:
        """Return the keys and pools whose tasks all have to wait, because they come after others that wait.

        A claim that only blocks their tasks leaves their locks to those who hand over places.
        """
        keys = [share.name for share in shares if share.kind == KEY]
        limits, awaited = send.together(self._limits(queue, keys), self._awaited(queue, shares))
        rules, firsts = _rules(limits), _firsts(awaited)
        for task in found:
            for share, rule in rules.shares_of(task):
                if share in firsts and (rule.is_strict or task.order < firsts[share]):
                    del firsts[share]
        return firsts

    def _numbers(self, queue: ClaimableQueue, shares: Iterable[Share]) -> dict[Share, int]:
        """Return the locks of keys and pools."""
        names = {share: "\0".join((self._schema or "", queue.queue.name, *share)) for share in shares}
        return {share: crc32(name.encode(errors="surrogatepass")) % LOCKS for share, name in names.items()}

    def _limits(self, queue: ClaimableQueue, keys: Iterable[str]) -> Sent:
        return limits_of(self._schema), {"from_queue": queue.queue.name, "keys": list(keys)}

    def _held(self, queue: ClaimableQueue, shares: Iterable[Share]) -> Sent:
        parameters = {
            "from_queue": queue.queue.name,
            "keys": [share.name for share in shares if share.kind == KEY],
            "pools": [share.name for share in shares if share.kind == POOL],
        }
        return held_places(self._schema), parameters

    def _awaited(self, queue: ClaimableQueue, shares: Iterable[Share]) -> Sent:
        kinds = {"kinds": [share.kind for share in shares], "names": [share.name for share in shares]}
        return awaited_shares(self._schema), kinds | {"from_queue": queue.queue.name}

    def _first_ids(
        self, send: Transaction, queue: ClaimableQueue, rules: Rules, found: Iterable[Candidate]
    ) -> dict[str, int]:
        strict = {
            task.key: rule.holds
            for task in found
            if task.key is not None and (rule := rules.of_key(task)) is not None and rule.is_strict
        }
        if not strict:
            return {}
        parameters = {
            "from_queue": queue.queue.name,
            "keys": list(strict),
            "holds": list(strict.values()),
        }
        rows = send(first_of_keys(self._schema), parameters).fetchall()
        return {key: first for key, first in rows if first is not None}

    def _with_first(
        self,
        send: Transaction,
        queue: ClaimableQueue,
        rules: Rules,
        found: list[Candidate],
        parameters: Mapping[str, Any],
    ) -> tuple[dict[str, int], list[Candidate]]:
        """Replace the tasks of strict keys by the first of each key, if that waits."""
        first_ids = self._first_ids(send, queue, rules, found)
        known = {task.id for task in found}
        if missing := [first for first in first_ids.values() if first not in known]:
            firsts = send(pick_first(self._schema), {**parameters, "ids": array_text(missing)})
            found = [*found, *_in_order(firsts)]
        firsts_only = [task for task in found if first_ids.get(task.key or "", task.id) == task.id]
        return first_ids, firsts_only

    def _remember_serial(self, rules: Rules, found: Iterable[Candidate], looked_at: Iterable[Share]) -> None:
        at_most = {share: rule.at_most for task in found for share, rule in rules.shares_of(task)}
        self._serial.difference_update(at_most, looked_at)
        if len(self._serial) < MAX_REMEMBERED:
            self._serial |= {share for share, number in at_most.items() if number == 1}

    def _wanted(self, queue: ClaimableQueue, freed: Freed) -> dict[str, Any]:
        return {
            **self._statement.form_and_parameters({queue: 1}, 1, 1)[1],
            "from_queue": queue.queue.name,
            "kinds": [share.kind for share in freed],
            "names": [share.name for share in freed],
            "most": list(freed.values()),
        }


def _lock(numbers: Mapping[Share, int]) -> Sent:
    """Take the locks of keys and pools, as far as they are free."""
    return lock_shares(), {"numbers": sorted(set(numbers.values()))}


def _locked(numbers: Mapping[Share, int], taken: Iterable[Sequence[int]]) -> set[Share]:
    """Return which keys and pools have their locks among those that were taken."""
    locks = {number for (number,) in taken}
    return {share for share, number in numbers.items() if number in locks}


def _rules(limits: Iterable[Sequence[Any]]) -> Rules:
    types: dict[str, Rule] = {}
    keyed_types: dict[str, Rule] = {}
    keys: dict[str, Rule] = {}
    whole: Rule | None = None
    for type_, key, at_most, is_of_key, *order in limits:
        rule = Rule(at_most, *order)
        if key:
            keys[key] = rule
        elif not type_:
            whole = rule
        else:
            (keyed_types if is_of_key else types)[type_] = rule
    return Rules(types, keyed_types, keys, whole)


def _firsts(rows: Iterable[Sequence[Any]]) -> dict[Share, Order]:
    """Return the first task that waits for each key or pool."""
    return {Share(kind, name): (-priority, *its) for kind, name, priority, *its in rows}


def _by_share(places: Iterable[Sequence[Any]]) -> dict[Share, list[int]]:
    """Return the places that are held."""
    held: dict[Share, list[int]] = {}
    for kind, name, slot in places:
        held.setdefault(Share(kind, name), []).append(slot)
    return held


def _in_order(rows: Iterable[Sequence[Any]]) -> list[Candidate]:
    """Return tasks in the order in which they should begin."""
    return sorted(
        (Candidate(*row) for row in rows), key=lambda task: (-task.priority, task.process_at, task.id)
    )


def _shares(placed: Iterable[Placed]) -> dict[int, tuple[Share, ...]]:
    """Return the places that tasks have got, by their ids."""
    return {
        each.task.id: tuple(
            Share(kind, name)
            for kind, name, slot in ((KEY, each.task.key, each.slot), (POOL, each.pool, each.pool_slot))
            if name is not None and slot is not None
        )
        for each in placed
    }


def _blocked(blocked: Sequence[Blocked]) -> dict[str, Any]:
    return {
        "ids": array_text(each.task.id for each in blocked),
        "kinds": [each.share.kind for each in blocked],
        "pools": [each.share.name if each.share.kind == POOL else None for each in blocked],
    }


def _ends(found: Iterable[Candidate], left: set[int], *, is_keyed: bool) -> dict[int, tuple[float, int]]:
    """Return up to where all tasks of each level were taken or blocked."""
    ends: dict[int, tuple[float, int]] = {}
    for priority, tasks in groupby(found, key=lambda task: task.priority):
        for task in tasks:
            if task.id in left:
                break
            ends[level_of(priority, is_keyed=is_keyed)] = task.process_at, task.id
    return ends


def _more(
    wanted: Freed, placed: Iterable[Placed], moved: Iterable[Blocked], serial: set[Share]
) -> dict[Share, int]:
    """Return for which keys and pools to look again: all tasks that were found are out of the way.

    They have places, and there may be more; or they wait for their keys, and their pool is free for others.
    The next look is for twice as many.
    """
    begun = Counter(each.task.awaited for each in placed)
    gone = Counter(each.task.awaited for each in moved if each.share.kind == KEY)
    return {
        share: 2 * count
        for share, count in wanted.items()
        if begun[share] + gone[share] >= count and (gone[share] or share not in serial)
    }
