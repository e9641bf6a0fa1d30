"""Every statement of the worker finds its rows by an index, on a table of many mixed rows."""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import probe
import pytest
import sqlalchemy as sa
from claims import AHEAD, asked, looked_into, note, surveyed
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateIndex

from apoq import Queue, Task
from apoq.cli.looking import SETTINGS
from apoq.core.options import checked
from apoq.postgres.connections import SESSION
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.browse import count_in_state
from apoq.schema.statements.cancel import cancel
from apoq.schema.statements.claim import CHANGED, CHANGED_IF_SET, DATA, claim
from apoq.schema.statements.count import COUNTED, count, count_running, count_types, queues, table_size
from apoq.schema.statements.expire import expire
from apoq.schema.statements.find import details, find, find_ids, find_queues, horizon
from apoq.schema.statements.heartbeat import leave
from apoq.schema.statements.keys import count_shares, find_shares
from apoq.schema.statements.lost import lost
from apoq.schema.statements.places import (
    awaited,
    awaited_shares,
    block,
    first_of_keys,
    held_places,
    pick_blocked,
    pick_due,
    pick_first,
    take,
    unblock,
)
from apoq.schema.statements.prune import (
    count_prunable_completed,
    count_prunable_failed,
    oldest_kept_completed,
    oldest_kept_failed,
    prune_completed,
    prune_completed_before,
    prune_failed,
    prune_failed_before,
)
from apoq.schema.statements.recover import forget_dead, give_back, rescue
from apoq.schema.statements.retry import retry
from apoq.schema.statements.select_many import lock_ended, lock_open
from apoq.schema.statements.settle import complete, remove, settle
from apoq.schema.statements.survey import survey
from apoq.schema.statements.take_keys import take_keys
from apoq.schema.statements.unique import holder, holders, release_ended, replace, replace_many
from apoq.schema.statements.unnoted import unnoted
from apoq.worker.claiming.cursor import ClaimCursor

MANY_ROWS = """
    INSERT INTO apoq_tasks
        (queue, type, priority, process_at, state, completed_at, failed_at, worker_id, data)
    SELECT
        CASE WHEN mod(n, 10) = 0 THEN 'other' ELSE 'default' END,
        CASE WHEN mod(n, 7) = 0 THEN 'foreign' ELSE 'ours' END,
        CASE WHEN mod(n, 5) = 0 THEN 10 ELSE 0 END,
        now() + CASE WHEN mod(n, 5) = 0 THEN interval '1 day' ELSE interval '-1 day' END,
        state,
        CASE state WHEN 'completed' THEN now() - n * interval '0.1 seconds' END,
        CASE state WHEN 'failed' THEN now() - n * interval '1 second' END,
        CASE state WHEN 'running' THEN gen_random_uuid() END,
        '{"x": "yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy"}'
    FROM (
        SELECT n, CASE
            WHEN mod(n, 100) < 30 THEN 'pending'
            WHEN mod(n, 1000) = 999 THEN 'running'
            WHEN mod(n, 100) < 33 THEN 'failed'
            ELSE 'completed'
        END AS state
        FROM generate_series(1, 200000) AS n
    ) AS numbers
"""


@pytest.fixture(scope="module")
def large_table(template, create_database, drop_database) -> Iterator[sa.Engine]:
    url = create_database(template.database)
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(MANY_ROWS)
        connection.exec_driver_sql("VACUUM ANALYZE apoq_tasks")
        note(connection)
    yield engine
    engine.dispose()
    drop_database(url)


def nodes(plan: dict) -> Iterator[dict]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


IDS = {"ids": array_text(range(1, 501)), "tokens": array_text([1] * 500)}
ALIKE = {"ids": IDS["ids"], "held_under": 1}
BEFORE = {"before": datetime.now(UTC)}
NEWEST = {"from_queue": "default", "number": 5}
PRUNE = {"from_queue": "default", "keep": timedelta(days=1), "at_most": 1_000}
OURS = looked_into(types=["ours"])
SETTLEMENTS = {
    **IDS,
    "states": ["failed"] * 500,
    "attempts": [1] * 500,
    "fail_counts": [1] * 500,
    "delays": [None] * 500,
    "errors": [None] * 500,
}
CLAIM = {**asked(types=["ours"]), **AHEAD}
KEY = {"task_queue": "default", "task_unique_key": "k"}
KEYS = {"task_queue": "default", "task_unique_keys": ["k", "l"]}
NEW = {
    **checked(),
    "task_type": "ours",
    "task_data": "{}",
    "task_key": None,
    "unique_until_end": None,
    "max_wait": None,
}
SHARES = {"after_queue": "a", "after_kind": "key", "after_name": "k", "at_most": 11, "with_running": True}
PLACES = {"from_queue": "default", "kinds": ["key", "pool"], "names": ["k", "ours"]}
TAKEN = {
    **CLAIM,
    "ids": IDS["ids"],
    "slots": [0] * 500,
    "pools": [None] * 500,
    "pool_slots": [None] * 500,
    "is_ahead": False,
}


STATEMENTS = [
    pytest.param(
        claim(None, ahead=True),
        CLAIM,
        {"apoq_tasks_open_idx"},
        id="claim",
    ),
    pytest.param(survey(None), OURS, {"apoq_tasks_open_idx"}, id="survey"),
    pytest.param(complete(None), IDS, {"apoq_tasks_pkey"}, id="complete"),
    pytest.param(remove(None), IDS, {"apoq_tasks_pkey"}, id="remove"),
    pytest.param(complete(None, alike=True), ALIKE, {"apoq_tasks_pkey"}, id="complete alike"),
    pytest.param(remove(None, alike=True), ALIKE, {"apoq_tasks_pkey"}, id="remove alike"),
    pytest.param(settle(None), SETTLEMENTS, {"apoq_tasks_pkey"}, id="settle"),
    pytest.param(complete(None, skips_locked=True), IDS, {"apoq_tasks_pkey"}, id="complete unlocked"),
    pytest.param(
        remove(None, alike=True, skips_locked=True), ALIKE, {"apoq_tasks_pkey"}, id="remove unlocked alike"
    ),
    pytest.param(settle(None, skips_locked=True), SETTLEMENTS, {"apoq_tasks_pkey"}, id="settle unlocked"),
    pytest.param(
        rescue(None),
        {
            "at_most": 1_000,
            "reason": "{}",
            "dead": [uuid.uuid4()],
        },
        {"apoq_tasks_pkey"},
        id="rescue",
    ),
    pytest.param(
        forget_dead(None),
        {"dead": [uuid.uuid4()]},
        {"apoq_tasks_pkey"},
        id="forget_dead",
    ),
    pytest.param(leave(None), {"worker_id": uuid.uuid4()}, {"apoq_tasks_pkey"}, id="leave"),
    pytest.param(
        give_back(None),
        {"by_worker": uuid.uuid4(), "known": "{1}", "held": "{1}", "latest": 2},
        {"apoq_tasks_pkey"},
        id="give_back",
    ),
    pytest.param(
        prune_completed(None), PRUNE, {"apoq_tasks_completed_idx", "apoq_tasks_pkey"}, id="completed"
    ),
    pytest.param(
        cancel(None),
        {"task_id": 1, "from_queue": "default", "reason": "{}"},
        {"apoq_tasks_pkey"},
        id="cancel",
    ),
    pytest.param(
        retry(None),
        {"task_id": 1, "from_queue": "default", "task_delay": None},
        {"apoq_tasks_pkey"},
        id="retry",
    ),
    pytest.param(holder(None), KEY, {"apoq_tasks_unique_key_idx"}, id="holder"),
    pytest.param(holders(None), KEYS, {"apoq_tasks_unique_key_idx"}, id="holders"),
    pytest.param(replace(None), KEY | NEW, {"apoq_tasks_unique_key_idx"}, id="replace"),
    pytest.param(
        replace_many(None),
        KEYS | NEW | {"task_data": "{}\n{}", "task_keys": [None, None]},
        {"apoq_tasks_unique_key_idx"},
        id="replace_many",
    ),
    pytest.param(release_ended(None), KEYS, {"apoq_tasks_unique_key_idx"}, id="release_ended"),
    pytest.param(
        take_keys(None),
        {"ids": IDS["ids"]},
        {"apoq_tasks_unique_key_idx", "apoq_tasks_pkey"},
        id="take_keys",
    ),
    pytest.param(pick_due(None, keyed=True), CLAIM, {"apoq_tasks_open_idx"}, id="pick due"),
    pytest.param(
        pick_blocked(None),
        PLACES | CLAIM | {"most": [1, 1]},
        {"apoq_tasks_blocked_idx"},
        id="pick blocked",
    ),
    pytest.param(pick_first(None), PLACES | CLAIM | {"ids": "{1,2}"}, {"apoq_tasks_pkey"}, id="pick first"),
    pytest.param(
        held_places(None),
        {"from_queue": "default", "keys": ["k"], "pools": ["ours"]},
        {"apoq_tasks_places_idx", "apoq_tasks_pools_idx"},
        id="held places",
    ),
    pytest.param(awaited_shares(None), PLACES, {"apoq_tasks_blocked_idx"}, id="awaited shares"),
    pytest.param(
        first_of_keys(None),
        {"from_queue": "default", "keys": ["k"], "holds": [False]},
        {"apoq_tasks_key_idx"},
        id="first of keys",
    ),
    pytest.param(take(None), TAKEN, {"apoq_tasks_pkey"}, id="take"),
    pytest.param(
        block(None),
        {"ids": IDS["ids"], "kinds": ["key"] * 500, "pools": [None] * 500},
        {"apoq_tasks_pkey"},
        id="block",
    ),
    pytest.param(unblock(None), {"ids": IDS["ids"]}, {"apoq_tasks_pkey"}, id="unblock"),
    pytest.param(
        awaited(None),
        {
            "queue_names": ["default"],
            "after_queue": "",
            "after_kind": "",
            "after_name": "",
            "at_most": 64,
        },
        {"apoq_tasks_blocked_idx"},
        id="awaited",
    ),
    pytest.param(lost(None), IDS, {"apoq_tasks_pkey"}, id="lost"),
    pytest.param(prune_failed(None), PRUNE, {"apoq_tasks_failed_idx", "apoq_tasks_pkey"}, id="failed"),
    pytest.param(
        prune_completed_before(None),
        PRUNE | BEFORE,
        {"apoq_tasks_completed_idx", "apoq_tasks_pkey"},
        id="completed_before",
    ),
    pytest.param(
        prune_failed_before(None),
        PRUNE | BEFORE,
        {"apoq_tasks_failed_idx", "apoq_tasks_pkey"},
        id="failed_before",
    ),
    pytest.param(
        oldest_kept_completed(None), NEWEST, {"apoq_tasks_completed_idx"}, id="oldest_kept_completed"
    ),
    pytest.param(oldest_kept_failed(None), NEWEST, {"apoq_tasks_failed_idx"}, id="oldest_kept_failed"),
    pytest.param(
        expire(None),
        {"in_queues": ["default"], "at_most": 1_000, "reason": "{}"},
        {"apoq_tasks_expires_at_idx", "apoq_tasks_pkey"},
        id="expire",
    ),
]

FIND = {
    "up_to_id": 2**63 - 1,
    "in_queue": None,
    "of_type": "ours",
    "since": None,
    "at_most": 20,
    "excerpt": 200,
}
ENDED = {"apoq_tasks_completed_idx", "apoq_tasks_failed_idx"}

RUNNING = {"apoq_tasks_pkey", "apoq_tasks_open_idx"}
SOON = 20.0

LOOKS = [
    pytest.param(find(None, None), FIND, {"apoq_tasks_pkey"}, id="find any"),
    pytest.param(find(None, "running"), FIND | {"at_most": 1_000}, RUNNING, id="find a rare state"),
    pytest.param(
        find(None, "failed"),
        FIND | {"in_queue": "none"},
        {"apoq_tasks_failed_idx"},
        id="find in an empty queue",
    ),
    pytest.param(horizon(None, None), FIND, {"apoq_tasks_pkey"}, id="horizon"),
    pytest.param(find_ids(None, "failed"), FIND | {"at_most": 100_000}, {"apoq_tasks_failed_idx"}, id="ids"),
    pytest.param(find_queues(None), {"ids": "{1,7}"}, {"apoq_tasks_pkey"}, id="find queues"),
    pytest.param(details(None), {"task_id": 7}, {"apoq_tasks_pkey"}, id="details"),
    pytest.param(
        queues(None),
        {"at_most": 100},
        {"apoq_tasks_open_idx", "apoq_tasks_waiting_idx"} | ENDED,
        id="queues",
    ),
    pytest.param(
        count(None),
        {"from_queue": "default"},
        {"apoq_tasks_open_idx", "apoq_tasks_waiting_idx"} | ENDED,
        id="count",
    ),
    pytest.param(
        count_types(None),
        {"from_queue": "default"},
        {"apoq_tasks_open_idx", "apoq_tasks_waiting_idx"} | ENDED,
        id="count types",
    ),
    pytest.param(count_running(None), {}, RUNNING, id="count running"),
    pytest.param(table_size(None), {}, set(), id="table size"),
    pytest.param(
        count_prunable_completed(None),
        PRUNE,
        {"apoq_tasks_completed_idx", "apoq_tasks_pkey"},
        id="count prunable completed",
    ),
    pytest.param(
        count_prunable_failed(None),
        PRUNE,
        {"apoq_tasks_failed_idx", "apoq_tasks_pkey"},
        id="count prunable failed",
    ),
    pytest.param(
        lock_ended(None, "failed", frozenset()),
        {"from_queue": "default", "looked_at": 0, "at_most": 1_000},
        {"apoq_tasks_failed_idx", "apoq_tasks_unique_key_idx"},
        id="lock ended",
    ),
    pytest.param(
        lock_ended(None, "failed", frozenset({"until"})),
        {"from_queue": "default", "looked_at": 0, "at_most": 1_000, "until": BEFORE["before"]},
        {"apoq_tasks_failed_idx", "apoq_tasks_unique_key_idx"},
        id="lock ended until",
    ),
    pytest.param(
        find_shares(None, after_keys=False),
        SHARES,
        {"apoq_tasks_places_idx", "apoq_tasks_pools_idx", "apoq_tasks_blocked_idx"},
        id="find shares",
    ),
    pytest.param(
        find_shares(None, after_keys=True),
        SHARES,
        {"apoq_tasks_places_idx", "apoq_tasks_pools_idx", "apoq_tasks_blocked_idx"},
        id="find shares after keys",
    ),
    pytest.param(
        count_shares(None),
        {"queue_names": ["default"], "kinds": ["key"], "names": ["k"], "running": 20, "waiting": 100},
        {"apoq_tasks_places_idx", "apoq_tasks_pools_idx", "apoq_tasks_blocked_idx"},
        id="count shares",
    ),
    pytest.param(
        count_in_state(None, "failed"),
        {"in_queues": ["default"], "counted": 10_001},
        {"apoq_tasks_failed_idx"},
        id="count in state",
    ),
    pytest.param(
        lock_open(None, "pending", frozenset({"of_type"})),
        {"from_queue": "default", "of_type": "ours", "at_most": 1_000},
        {"apoq_tasks_open_idx"},
        id="lock open",
    ),
]
"""What people look with: planned for their parameters, each time."""


@pytest.mark.parametrize(("statement", "parameters", "indexes"), STATEMENTS)
def test_a_statement_of_a_worker_reads_by_its_indexes_only(large_table, statement, parameters, indexes):
    sql, values = probe.compiled(statement, parameters)
    with large_table.connect() as connection:
        plan = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {sql}", values).scalar()[0]["Plan"]
    used = {node.get("Index Name", "") for node in nodes(plan)}
    scanned = [node for node in nodes(plan) if node["Node Type"] == "Seq Scan"]

    assert {name for name in used if name.startswith("apoq_tasks")} == indexes
    assert not [node for node in scanned if node["Relation Name"] == "apoq_tasks"]


@pytest.mark.parametrize(("statement", "parameters", "indexes"), STATEMENTS)
def test_a_generic_plan_of_a_workers_statement_reads_by_its_indexes_only(
    large_table, statement, parameters, indexes
):
    """As of a prepared statement, and in a session such as the worker's own."""
    sql, values = probe.compiled(statement, parameters)
    for number, name in enumerate(values, 1):
        sql = sql.replace(f"%({name})s", f"${number}")
    with large_table.connect() as connection:
        if connection.dialect.server_version_info < (16,):
            pytest.skip("EXPLAIN (GENERIC_PLAN) came with PostgreSQL 16")
        connection.exec_driver_sql(SESSION)
        plan = connection.exec_driver_sql(f"EXPLAIN (GENERIC_PLAN, FORMAT JSON) {sql}").scalar()[0]["Plan"]
        connection.exec_driver_sql("RESET ALL")
    used = {node.get("Index Name", "") for node in nodes(plan)}

    assert {name for name in used if name.startswith("apoq_tasks")} == indexes
    assert "Seq Scan" not in {node["Node Type"] for node in nodes(plan) if "apoq_tasks" in node.values()}


@pytest.mark.parametrize(
    ("statement", "parameters"),
    [param.values[:2] for param in STATEMENTS if param.id in {"complete", "complete alike"}],
)
def test_a_completion_takes_no_index_of_the_users(large_table, statement, parameters):
    """An index of running tasks looks small to the planner, and is full of those that have ended since."""
    sql, values = probe.compiled(statement, parameters)
    with large_table.connect() as connection:
        connection.exec_driver_sql("CREATE INDEX users ON apoq_tasks (worker_id) WHERE state = 'running'")
        plan = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {sql}", values).scalar()[0]["Plan"]
        connection.exec_driver_sql("DROP INDEX users")

    assert {node["Index Name"] for node in nodes(plan) if "Index Name" in node} == {"apoq_tasks_pkey"}


def test_each_index_is_needed():
    """By something that the workers do again and again, or it would not be worth its writes."""
    needed = set().union(*(parameter.values[2] for parameter in STATEMENTS))

    # A plain task never enters the index of waiting ones, with which people look at them.
    needed.add("apoq_tasks_waiting_idx")
    # Nor the index of the groups, with which people look at them.
    needed.add("apoq_tasks_group_idx")
    assert needed == {"apoq_tasks_pkey", *(index.name for index in Task.__table__.indexes)}


def test_a_claim_reads_few_pages_however_many_rows_are_in_front(large_table):
    """Those in the future and of a higher priority cost one look into the index."""
    plan = claimed(large_table, CLAIM)
    updated = next(node for node in nodes(plan) if node["Node Type"] == "ModifyTable")
    looked = next(node for node in nodes(plan) if node.get("Index Name") == "apoq_tasks_open_idx")

    assert updated["Actual Rows"] == 500
    # Without a scan for each priority 385 on PostgreSQL 15; 18 skips what is in front by itself.
    assert pages(looked) < 150
    # Some dozen for each row that is taken: its row, its indexes, its new version.
    assert pages(plan) < 500 * 20


def test_a_claim_after_a_survey_reads_few_pages_if_all_due_tasks_are_of_other_types(large_table):
    cursor = ClaimCursor()
    with large_table.connect() as connection:
        surveyed(cursor, connection.execute(survey(None), looked_into(types=["rare"])))

    plan = claimed(large_table, {**asked(cursor, types=["rare"]), **AHEAD})

    assert pages(plan) < 100


def test_what_a_claim_changes_is_known():
    changed = re.findall(r"(\w+)=", str(claim(None, ahead=True).compile(dialect=postgresql.dialect())))

    assert set(changed) == {*CHANGED, *CHANGED_IF_SET}
    assert not set(CHANGED) & {
        name
        for index in Task.__table__.indexes
        for name in re.findall(r"\w+", str(CreateIndex(index).compile(dialect=postgresql.dialect())))
    }


def test_a_claim_of_plain_tasks_is_heap_only(engine):
    with Session(engine) as session, session.begin():
        Queue().add_many(session, "ours", [{}] * 50, meta={"tenant": 7})
    with engine.begin() as connection:
        parameters = CLAIM
        taken = connection.execute(claim(None, ahead=True), parameters).all()
        updated = connection.execute(
            sa.text(
                "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_xact_user_tables WHERE relname = 'apoq_tasks'"
            )
        ).one()

    assert (len(taken), *updated) == (50, 50, 50)


@pytest.mark.parametrize(("until", "hot"), [("started", 0), ("ended", 50)])
def test_a_claim_of_tasks_with_unique_keys_writes_to_the_indexes_only_if_it_gives_the_keys_up(
    engine, until, hot
):
    with Session(engine) as session, session.begin():
        Queue().add_many(session, "ours", list(range(50)), unique_key=str, unique_until=until)
    with engine.begin() as connection:
        taken = connection.execute(claim(None, ahead=True), CLAIM).all()
        updated = connection.execute(
            sa.text(
                "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_xact_user_tables WHERE relname = 'apoq_tasks'"
            )
        ).one()

    assert (len(taken), *updated) == (50, 50, hot)


FORMS = [
    pytest.param({}, {}, id="plain"),
    pytest.param({"ahead": True}, AHEAD, id="ahead"),
    pytest.param({"passes_over": True}, {"passed_over": "{7,8}"}, id="passes over"),
    pytest.param({"overflows": True}, {"lower_than": 0}, id="overflows"),
]
"""The forms of a claim, and what each takes in addition."""


LARGE_DATA_READ = sa.text("""
    SELECT pg_stat_get_xact_blocks_fetched(reltoastrelid) FROM pg_class WHERE oid = 'apoq_tasks'::regclass
""")
"""How many pages with large data this transaction has read."""


class TestThePartsOfAClaim:
    """Each named part of `claim` keeps its share of the plan, whatever later forms add."""

    @pytest.mark.parametrize(("form", "more"), FORMS)
    def test_levels_each_level_is_one_scan_that_begins_behind_its_position(self, large_table, form, more):
        explained = claimed(large_table, self.parameters(large_table, more), **form)
        [levels] = [node for node in nodes(explained) if node.get("Alias") == "levels"]
        scan = next(node for node in nodes(explained) if node.get("Index Name") == "apoq_tasks_open_idx")

        assert levels["Node Type"] == "Function Scan"
        assert scan["Actual Loops"] <= levels["Actual Rows"]
        for condition in ("queue", "priority", "ROW(process_at, id) >"):
            assert condition in scan["Index Cond"]

    @pytest.mark.parametrize(("form", "more"), FORMS)
    def test_predicate_what_is_not_due_is_not_read_and_other_types_are_only_filtered(
        self, large_table, form, more
    ):
        explained = claimed(large_table, self.parameters(large_table, more), **form)
        scan = next(node for node in nodes(explained) if node.get("Index Name") == "apoq_tasks_open_idx")

        assert "process_at <= now()" in scan["Index Cond"]
        assert "type" in scan["Filter"]
        # One in seven is of another type, and nothing else is in the way.
        assert scan["Rows Removed by Filter"] < CLAIM["at_most"]

    @pytest.mark.parametrize(("form", "more"), FORMS)
    def test_order_comes_from_the_index_and_nothing_is_sorted(self, large_table, form, more):
        explained = claimed(large_table, self.parameters(large_table, more), **form)
        types = {node["Node Type"] for node in nodes(explained)}

        assert not types & {"Sort", "Incremental Sort", "HashAggregate", "Unique"}
        assert {"Limit", "LockRows"} <= types

    @pytest.mark.parametrize(("form", "more"), FORMS)
    def test_effect_rows_are_updated_where_they_stand(self, large_table, form, more):
        explained = claimed(large_table, self.parameters(large_table, more), **form)
        updates = [node for node in nodes(explained) if node.get("Operation") == "Update"]

        assert len(updates) == 1
        assert [node["Node Type"] for node in updates[0]["Plans"] if "Tid" in node["Node Type"]] == [
            "Tid Scan"
        ]

    @pytest.mark.parametrize("bare", [False, True])
    def test_returned_row_leaves_large_data_where_it_is(self, engine, bare):
        with Session(engine) as session, session.begin():
            Queue().add_many(session, "ours", [{"x": [n * 7919 for n in range(20_000)]}] * 20)
        engine.dispose()  # a server's session counts what it has read until it reports it, a second later
        with engine.connect() as connection:
            parameters = CLAIM
            rows = connection.execute(claim(None, ahead=True, bare=bare), parameters).all()
            read = connection.scalar(LARGE_DATA_READ)
            connection.execute(sa.text("SELECT sum(length(data::text)) FROM apoq_tasks"))
            read_in_full = connection.scalar(LARGE_DATA_READ)

        assert [row[DATA] for row in rows] == [None] * 20
        assert (read, read_in_full > 20) == (0, True)

    def parameters(self, engine: sa.Engine, more: dict) -> dict:
        cursor = ClaimCursor()
        with engine.connect() as connection:
            surveyed(cursor, connection.execute(survey(None), OURS))
        return {**asked(cursor, types=["ours"], lower_than=more.get("lower_than")), **AHEAD, **more}


def claimed(engine: sa.Engine, parameters: dict, **form: bool) -> dict:
    """Explain a claim that was executed, and is undone."""
    sql, values = probe.compiled(claim(None, **(form or {"ahead": True})), parameters)
    with engine.connect() as connection:
        connection.exec_driver_sql("BEGIN")
        explained = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}", values)
        connection.exec_driver_sql("ROLLBACK")
        return explained.scalar()[0]["Plan"]


def pages(plan: dict) -> int:
    return plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]


@pytest.mark.parametrize(("statement", "parameters", "indexes"), LOOKS)
def test_a_statement_of_the_command_line_reads_by_its_indexes_only(
    large_table, statement, parameters, indexes
):
    plan = look(large_table, statement, parameters)
    used = {node["Index Name"] for node in nodes(plan) if node.get("Relation Name") == "apoq_tasks"}

    assert used == indexes


def look(engine: sa.Engine, statement: sa.Select, parameters: dict, options: str = "") -> dict:
    """Explain a statement as the command line sends it."""
    sql, values = probe.compiled(statement, parameters)
    with engine.execution_options(isolation_level="READ COMMITTED").begin() as connection:
        connection.exec_driver_sql(SETTINGS)
        explained = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON{options}) {sql}", values)
        return explained.scalar()[0]["Plan"]


def test_the_sweep_reads_no_claims_for_tasks_of_a_living_worker(engine, make_worker):
    """It compared each running task with the ids of all claims, and took a second in a busy queue."""
    begun, may_end = threading.Semaphore(0), threading.Event()

    def wait(_: object) -> None:
        begun.release()
        may_end.wait(SOON)

    worker = make_worker(concurrency=4)
    worker.use("ours", wait)
    with Session(engine) as session, session.begin():
        Queue().add_many(session, "ours", [{}] * 4)
    worker.start()
    for _ in range(4):
        assert begun.acquire(timeout=SOON)
    behind = {"time": "-infinity", "id": 0, "queue": "default", "level": 0, "at_most": 100}
    plan = look(engine, unnoted(None), behind, ", ANALYZE")
    may_end.set()

    looks = [node["Actual Loops"] for node in nodes(plan) if node.get("Relation Name") == "apoq_claims"]
    assert plan["Actual Rows"] == 1  # the last of the walk, which is not unnoted
    assert sum(looks) == 0


@pytest.mark.parametrize("queue", ["default", "other"])
@pytest.mark.parametrize("statement", [count(None), count_types(None)], ids=["by state", "by type"])
def test_counting_reads_few_pages_however_many_rows_there_are(large_table, statement, queue):
    plan = look(large_table, statement, {"from_queue": queue}, ", ANALYZE, BUFFERS")
    rows = [node["Actual Rows"] * node["Actual Loops"] for node in nodes(plan) if "Index Name" in node]

    assert max(rows) <= COUNTED + 1
    assert pages(plan) < 6 * COUNTED


@pytest.mark.parametrize("state", ["failed", "completed", "waiting"])
def test_counting_the_tasks_of_a_list_needs_the_index_only(large_table, state):
    plan = look(large_table, count_in_state(None, state), {"in_queues": ["default"], "counted": 1_001})

    assert [node["Node Type"] for node in nodes(plan) if "Index Name" in node] == ["Index Only Scan"]


def test_pending_tasks_are_locked_in_the_order_of_their_index(large_table):
    parameters = {"from_queue": "default", "at_most": 100}
    plan = look(large_table, lock_open(None, "pending", frozenset()), parameters)

    assert [node for node in nodes(plan) if node["Node Type"] == "Sort"] == []


def test_counting_running_tasks_reads_few_pages(session):
    session.execute(
        sa.text(
            "INSERT INTO apoq_tasks (type, state, worker_id)"
            " SELECT 't', 'running', gen_random_uuid() FROM generate_series(1, :many)"
        ),
        {"many": COUNTED + 2},
    )
    note(session.connection())

    counted = session.execute(count_running(None)).all()

    assert sum(row.number for row in counted) == COUNTED + 1


@pytest.mark.parametrize(
    "name", ["claim", "survey", "complete", "remove", "settle", "rescue", "give_back", "lost"]
)
def test_a_worker_tells_the_database_no_time_of_day(name):
    """Its clock may be wrong: it sends durations, and the database's own times."""
    (statement,) = (param.values[0] for param in STATEMENTS if param.id == name)

    bound = statement.compile(dialect=postgresql.dialect()).binds.values()

    assert not [
        parameter for parameter in bound if isinstance(parameter.type, sa.DateTime | sa.Date | sa.Time)
    ]
