"""Every statement that apoq sends has a form that Citus plans on a sharded schema.

There is no Citus here. These are the rules of its planner for tables of a single shard, as far as apoq's
statements have met them. They are applied to PostgreSQL's own parse trees, which are what that planner gets.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, Final, get_origin, get_type_hints

import citus_stand_in
import probe
import pytest
import sqlalchemy as sa
from psycopg import sql
from query_trees import (
    Trees,
    has_ctid,
    is_column,
    is_constant,
    is_query,
    is_recursive,
    is_subquery,
    is_write,
    locks,
    text_of,
    walk,
)
from sqlalchemy import Executable
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

from apoq.core.states import STATES
from apoq.schema import statements
from apoq.schema.statements.select_many import FILTERS

IN_SHARDED_SCHEMAS: Final = {
    "claim.claim": {"bare": True, "noted": False},
    "places.take": {"bare": True, "noted": False},
}
"""The options of statements that have another form where Citus shards the schema.

Elsewhere, a claim is recorded by the same statement, and returns data only if it is short.
"""

PARTS: Final = {
    "limits.limited",
    "settle.unless_followed",
    "notes.note",
    "notes.note_ids",
    "notes.forget_claims",
    "pauses.next_resumes",
}
"""Functions that return a statement which is only used within others."""

WITHOUT_PLAN: Final = {"enqueue.copy_many", "notify.FLUSH_NOTHING"}
"""COPY and SET."""

WRITES: Final = {
    "begin.begin": 1,
    "cancel.cancel": 1,
    "cancel.cancel_many": 1,
    "cascade.apply_failures": 2,
    "cascade.reopen": 1,
    "cascade.revive": 1,
    "check_links.checked": 1,
    "check_links.follow": 1,
    "claim.claim": 2,
    "completion.statement": 1,
    "completion.statement_with_results": 1,
    "completion.with_edges": 3,
    "completion.write": 1,
    "enqueue.enqueue": 1,
    "enqueue.enqueue_many": 1,
    "expire.expire": 1,
    "groups.add_to_own_edges": 1,
    "heartbeat.beat": 1,
    "heartbeat.beat_and_look": 1,
    "heartbeat.forget": 1,
    "heartbeat.leave": 2,
    "limits.declare": 1,
    "limits.remove_unused": 1,
    "limits.set_limit": 1,
    "links.enqueue_linked": 1,
    "links.enqueue_many_linked": 1,
    "links.enqueue_unique_linked": 1,
    "links.follow_new": 1,
    "links.link": 1,
    "notes.note_tasks": 1,
    "notes.forget_settled": 1,
    "pauses.pause": 1,
    "pauses.resume": 1,
    "places.block": 1,
    "places.take": 2,
    "places.unblock": 1,
    "progress.delete_orphans": 1,
    "progress.mark_parts": 1,
    "progress.write_progress": 1,
    "prune.prune_completed": 4,
    "prune.prune_completed_before": 4,
    "prune.prune_failed": 4,
    "prune.prune_failed_before": 4,
    "recover.forget_dead": 1,
    "recover.forget_unknown": 1,
    "recover.give_back": 1,
    "recover.rescue": 1,
    "recover.rescue_unnoted": 1,
    "results.complete_last_with_result": 1,
    "results.complete_with_results": 1,
    "retry.retry": 1,
    "retry.retry_many": 1,
    "schedules.add_now": 1,
    "schedules.delete_schedule": 1,
    "schedules.pause_schedule": 1,
    "schedules.resume_schedule": 1,
    "schedules.write_schedule": 1,
    "settle.complete": 1,
    "settle.complete_last": 1,
    "settle.remove": 1,
    "settle.remove_last": 1,
    "settle.settle": 1,
    "result_writer.write_settlements": 1,
    "take_keys.take_keys": 1,
    "throttles.begin_windows": 1,
    "throttles.end_windows": 1,
    "throttles.prune_windows": 1,
    "ticks.add_ticks": 1,
    "ticks.move_on": 1,
    "unblock.count_off": 2,
    "unique.enqueue_many_unique": 1,
    "unique.enqueue_unique": 1,
    "unique.release_ended": 1,
    "unique.replace": 1,
    "unique.replace_many": 1,
    "unique.reserve": 1,
    "unique.unreserve": 1,
}
"""How many UPDATEs, INSERTs and DELETEs each statement has; all others only read."""


# The rules.


def violations(trees: Trees, statement: str) -> set[str]:
    """Return the rules that a statement breaks."""
    tree = trees.of(statement)
    queries = [node for node in walk(tree) if is_query(node)]
    writes = [query for query in queries if is_write(query)]
    broken = {rule for query in writes for rule in broken_by(trees, query)}
    if len(writes) > 1 and any(has_ctid(node) for node in walk(tree)):
        broken.add("ctid with several writes")
    if len(writes) > 1 and any(is_write(query, "INSERT") for query in writes):
        broken.add("INSERT with another write")
    if writes and any(text_of(node) == "lock_timeout" for node in walk(tree)):
        broken.add("lock_timeout, which doesn't reach the node")
    if any(locks(query) for node in walk(tree) if is_recursive(node) for query in walk(node)):
        broken.add("FOR UPDATE in a recursion")
    return broken


def broken_by(trees: Trees, query: Any) -> Iterator[str]:
    """Yield the rules that one write breaks."""
    if is_write(query, "INSERT"):
        if has_values(query) and any(is_subquery(node) for node in walk([query.targetList, query.rtable])):
            yield "subquery in VALUES"
    else:
        yield from broken_by_expression(trees, [query.targetList, query.jointree])
    if any(trees.volatility(node) != "i" for node in walk(query.onConflict)):
        yield "ON CONFLICT with a function that isn't immutable"
    if any(trees.volatility(node) != "i" for node in walk(query.returningList)):
        yield "RETURNING with a function that isn't immutable"


def broken_by_expression(trees: Trees, expressions: Any) -> Iterator[str]:
    """Yield the rules that what an UPDATE sets, or its condition or that of a DELETE, breaks."""
    if any(trees.volatility(node) == "v" for node in walk(expressions, but_not_in=is_constant)):
        yield "volatile function outside a scalar subquery"
    for node in walk(expressions, but_not_in=is_subquery):
        if trees.volatility(node) == "s":
            if any(map(is_column, walk(node, but_not_in=is_subquery))):
                yield "stable function of a column"
            elif node.kind == "OPEXPR":
                yield "stable operator outside a subquery"
        if node.kind in ("CASEEXPR", "COALESCEEXPR") and any(
            trees.volatility(each) == "s" for each in walk(node, but_not_in=is_constant)
        ):
            yield "stable function in CASE or COALESCE"


def has_values(query: Any) -> bool:
    """Return whether an INSERT has VALUES, and not a SELECT."""
    return query.jointree.fromlist == "<>" or any(
        node.fields.get("rtekind") == "5" for node in walk(query.rtable)
    )


BAD: Final = {
    "volatile function outside a scalar subquery": """
        UPDATE apoq_tasks SET cancelled_at = clock_timestamp() WHERE id = 1;
        DELETE FROM apoq_tasks WHERE set_config('statement_timeout', '1s', true) IS NOT NULL;
        DELETE FROM apoq_tasks WHERE EXISTS (SELECT FROM apoq_workers WHERE expires_at < clock_timestamp());
        WITH gone AS (DELETE FROM apoq_tasks WHERE created_at < clock_timestamp()) SELECT
    """,
    "stable function of a column": """
        UPDATE apoq_tasks SET process_at = to_timestamp(date_part('epoch', process_at) + 1);
        UPDATE apoq_tasks SET process_at = process_at + interval '1 second';
        DELETE FROM apoq_workers WHERE version::regclass = $1
    """,
    "stable operator outside a subquery": """
        UPDATE apoq_tasks SET process_at = statement_timestamp() + interval '1 second';
        DELETE FROM apoq_workers WHERE expires_at < statement_timestamp() - $1::interval
    """,
    "stable function in CASE or COALESCE": """
        UPDATE apoq_tasks SET failed_at = CASE WHEN prefetched THEN failed_at ELSE now() END;
        UPDATE apoq_tasks SET failed_at = coalesce($1, now())
    """,
    "ON CONFLICT with a function that isn't immutable": """
        INSERT INTO apoq_claims VALUES ($1, $2, $3)
            ON CONFLICT (worker_id, number) DO UPDATE SET number = pg_backend_pid()
    """,
    "RETURNING with a function that isn't immutable": """
        DELETE FROM apoq_tasks WHERE id = 1 RETURNING statement_timestamp();
        INSERT INTO apoq_tasks (type) VALUES ($1) RETURNING extract(epoch FROM created_at)
    """,
    "subquery in VALUES": """
        INSERT INTO apoq_claims VALUES ($1, (SELECT 1), $2);
        INSERT INTO apoq_claims VALUES ($1, 1, $2), ($1, (SELECT 2), $2)
    """,
    "ctid with several writes": """
        WITH gone AS (DELETE FROM apoq_claims) UPDATE apoq_tasks SET state = 'failed'
            WHERE ctid = ANY(ARRAY(SELECT ctid FROM apoq_tasks FOR UPDATE SKIP LOCKED))
    """,
    "INSERT with another write": """
        WITH note AS (INSERT INTO apoq_claims VALUES ($1, $2, $3)) DELETE FROM apoq_tasks
    """,
    "lock_timeout, which doesn't reach the node": """
        DELETE FROM apoq_tasks WHERE (SELECT set_config('lock_timeout', '1s', true)) IS NOT NULL
    """,
    "FOR UPDATE in a recursion": """
        WITH RECURSIVE walk AS (
            SELECT 1 AS n UNION ALL
            SELECT n + 1 FROM walk, LATERAL (SELECT FROM apoq_tasks LIMIT 1 FOR UPDATE) AS first WHERE n < 3
        ) SELECT FROM walk
    """,
}
"""Statements that break a rule, and only that one."""

GOOD: Final = """
    UPDATE apoq_tasks SET process_at = to_timestamp((SELECT date_part('epoch', statement_timestamp())) + $1);
    UPDATE apoq_tasks SET completed_at = now(),
        failed_at = CASE WHEN prefetched THEN failed_at ELSE (SELECT statement_timestamp()) END;
    DELETE FROM apoq_workers WHERE expires_at < (SELECT statement_timestamp() - $1::interval);
    DELETE FROM apoq_claims WHERE number = ANY ($1::text::bigint[]);
    INSERT INTO apoq_tasks (type, process_at) VALUES ($1, clock_timestamp() + $2::interval)
        RETURNING id, extract(epoch FROM timezone('UTC', created_at)), date_part('epoch', timeout);
    INSERT INTO apoq_claims SELECT $1, (SELECT 1), $2
        ON CONFLICT (worker_id, number) DO UPDATE SET number = excluded.number;
    UPDATE apoq_tasks SET state = 'failed' WHERE ctid = ANY(ARRAY(SELECT ctid FROM apoq_tasks FOR UPDATE));
    WITH gone AS (DELETE FROM apoq_claims) UPDATE apoq_tasks SET state = 'failed'
"""


# What apoq sends.


def found() -> dict[str, Any]:
    """Return every statement, and every function that returns one, of apoq.schema.statements."""
    names = [info.name for info in pkgutil.iter_modules(statements.__path__)]
    modules = {name: importlib.import_module(f"{statements.__name__}.{name}") for name in names}
    return {
        f"{name}.{public}": value
        for name, module in modules.items()
        for public, value in vars(module).items()
        if not public.startswith("_") and is_statement(module, value)
    }


def is_statement(module: Any, value: Any) -> bool:
    if isinstance(value, sa.TextClause):
        return True
    if not inspect.isfunction(inspect.unwrap(value)) or value.__module__ != module.__name__:
        return False
    returned = get_type_hints(value)["return"]
    kind = get_origin(returned) or returned
    return isinstance(kind, type) and issubclass(kind, Executable | sql.Composable) and kind is not sa.CTE


VALUES: Final[dict[str, tuple[Any, ...]]] = {
    "schema: str | None": (None,),
    "state: str | None": (None, *STATES),
    "state: str": STATES,
    "filters: Filters": (frozenset(), frozenset(FILTERS)),
    "sequence: str": ("apoq_tasks_id_seq",),
    "sequence_schema: str": ("public",),
    "bool": (False, True),
    "given: frozenset[str] | None": (
        None,
        frozenset({"task_queue", "task_type", "task_priority"}),
        frozenset({"task_queue", "task_type", "task_priority", "task_delay", "task_expires_in"}),
    ),
}
"""The arguments of the functions, by a parameter or its type."""


def variants(make: Callable[..., Executable], **given: Any) -> Iterator[Executable]:
    """Yield the statements that a function returns, with all options that agree with the given ones."""
    parameters = inspect.signature(make).parameters
    kinds = {name: each.annotation for name, each in parameters.items()}
    values = [VALUES.get(f"{name}: {kind}") or VALUES.get(kind) for name, kind in kinds.items()]
    assert all(values), f"VALUES must have the arguments of {make.__name__}{inspect.signature(make)}"
    for chosen in itertools.product(*values):
        options = dict(zip(parameters, chosen, strict=True))
        if options == options | given:
            yield make(**options)


FOUND: Final = found()
SETTLING: Final = probe.settling_statements()
SENT: Final = sorted((FOUND.keys() | SETTLING.keys()) - PARTS - WITHOUT_PLAN)
"""The names of all statements with a plan."""


def texts(name: str, **options: Any) -> list[str]:
    """Return the variants of a statement in SQL."""
    its = SETTLING.get(name) or (variants(FOUND[name], **options) if callable(FOUND[name]) else [FOUND[name]])
    dialect = PGDialect_psycopg(paramstyle="numeric_dollar")
    return [str(statement.compile(dialect=dialect)) for statement in its]


@pytest.fixture(scope="module")
def trees(template, create_database, drop_database) -> Iterator[Trees]:
    url = create_database(template.database)
    engine = sa.create_engine(url)
    citus_stand_in.install(engine)
    with engine.connect() as connection:
        yield Trees(connection)
    engine.dispose()
    drop_database(url)


@pytest.mark.parametrize("name", SENT)
def test_a_statement_keeps_the_rules(trees, name):
    sent = texts(name, **IN_SHARDED_SCHEMAS.get(name, {}))

    assert {rule for text in sent for rule in violations(trees, text)} == set()


def test_a_claim_in_one_statement_breaks_the_rules(trees):
    """So it takes two forms."""
    assert all(violations(trees, text) for text in texts("claim.claim", noted=True))


@pytest.mark.parametrize("name", SENT)
def test_how_much_a_statement_writes_is_known(trees, name):
    writes = {sum(map(is_write, walk(trees.of(text)))) for text in texts(name)}

    assert max(writes) == WRITES.get(name, 0)


def test_nothing_is_listed_that_does_not_exist():
    assert {*IN_SHARDED_SCHEMAS, *PARTS, *WITHOUT_PLAN, *WRITES} <= FOUND.keys() | SETTLING.keys()


@pytest.mark.parametrize(
    ("rule", "statement"), [(rule, each) for rule, its in BAD.items() for each in its.split(";")]
)
def test_a_statement_that_breaks_a_rule_is_found(trees, rule, statement):
    assert violations(trees, statement) == {rule}


@pytest.mark.parametrize("statement", GOOD.split(";"))
def test_a_statement_that_breaks_none_is_not(trees, statement):
    assert violations(trees, statement) == set()
