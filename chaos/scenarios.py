"""The scenarios: each makes a fault, and returns the time from which the recovery counts."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.child import memory
from chaos.server import Place, Server, Skipped, end, fill, free_port, until
from chaos.stage import SLOTS, Stage, Worker
from chaos.watcher import WORKERS

PGBOUNCER = Path("/usr/sbin/pgbouncer")
LEASE = 15
TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'"


@dataclass(frozen=True)
class Options:
    """Options of the command for all scenarios."""

    rate: float = 300
    seed: int = 1
    minutes: float = 60
    is_quick: bool = False


Fault = Callable[[Stage, Options], float | None]
"""Makes a fault; returns the time (time.monotonic()) from which the recovery counts, or None for its end."""


@dataclass(frozen=True)
class Scenario:
    """One kind of fault."""

    title: str
    run: Callable[[Place, Server, Path, Options], dict[str, Any]]
    is_quick: bool = False
    is_default: bool = True


SCENARIOS: dict[str, Scenario] = {}


def scenario(
    *, quick: bool = False, share: float = 1.0, schemas: Sequence[str] = (), **how: Any
) -> Callable[[Fault], Fault]:
    """Register a fault as a scenario on the shared server, with a share of the usual rate."""

    def register(fault: Fault) -> Fault:
        name = fault.__name__

        def run(_place: Place, server: Server, folder: Path, options: Options) -> dict[str, Any]:
            with Stage(server, name, folder, options.rate * share, schemas) as stage:
                return play(stage, fault, options, **how)

        SCENARIOS[name] = Scenario((fault.__doc__ or "").split("\n")[0], run, quick)
        return fault

    return register


def play(stage: Stage, fault: Fault, options: Options, *, holds: bool = True, **how: Any) -> dict[str, Any]:
    """Run the load, make the fault, wait for the recovery, and count."""
    stage.begin(**how)
    if holds:
        stage.hold_each()
    strike(stage, fault, options)
    return stage.finish()


def strike(stage: Stage, fault: Fault, options: Options) -> None:
    """Make the fault, and wait for the recovery."""
    stage.log("the fault begins")
    over = fault(stage, options)
    stage.log("the fault is over")
    stage.await_recovery(time.monotonic() if over is None else over)
    stage.log("recovered")


@scenario(quick=True)
def sigkill(stage: Stage, _options: Options) -> float:
    """A worker is killed, and a new one is started."""
    return _kill(stage)


def _kill(stage: Stage) -> float:
    worker = stage.workers[-1]
    since = stage.strike(worker, partial(worker.process.send, signal.SIGKILL))
    stage.replace(worker)
    return since


@scenario()
def sigkill_repeated(stage: Stage, _options: Options) -> float:
    """A worker is killed every three seconds, eight times."""
    since = 0.0
    for number in range(8):
        worker = stage.workers[number % len(stage.workers)]
        since = stage.strike(worker, partial(worker.process.send, signal.SIGKILL))
        stage.replace(worker)
        time.sleep(3)
    return since


@scenario()
def zombie(stage: Stage, _options: Options) -> None:
    """A worker is paused for longer than its lease, and then continues."""
    worker = stage.workers[-1]
    stage.strike(worker, partial(worker.process.send, signal.SIGSTOP))
    time.sleep(LEASE + 6)
    worker.process.send(signal.SIGCONT)


def _restart(stage: Stage, options: Options, how: int) -> None:
    stage.server.stop(how)
    time.sleep(3 if options.is_quick else 5)
    stage.server.start()


@scenario()
def restart_fast(stage: Stage, options: Options) -> None:
    """The server is shut down, and started again 5 s later."""
    _restart(stage, options, signal.SIGINT)


@scenario(quick=True)
def restart_immediate(stage: Stage, options: Options) -> None:
    """The server is shut down as if it had crashed, and started again 5 s later."""
    _restart(stage, options, signal.SIGQUIT)


@scenario(quick=True)
def terminate(stage: Stage, options: Options) -> None:
    """All sessions are terminated five times per second, for 10 s."""
    with stage.server.admin() as admin:
        for _ in range(15 if options.is_quick else 50):
            admin.execute(TERMINATE)
            time.sleep(0.2)


@scenario()
def exhausted(stage: Stage, _options: Options) -> None:
    """All sessions are terminated, and another program takes all connections for 10 s."""
    taken: list[psycopg.Connection[Any]] = []
    url = stage.server.url("postgres").replace("+psycopg", "") + "?application_name=taker"
    query = TERMINATE + " AND application_name <> 'taker'"
    deadline = time.monotonic() + 10
    try:
        with stage.server.admin() as admin:
            while time.monotonic() < deadline:
                admin.execute(query)
                with suppress(psycopg.OperationalError):
                    while True:
                        taken.append(psycopg.connect(url))
                time.sleep(0.1)
    finally:
        for connection in taken:
            connection.close()


def _cut(stage: Stage, seconds: float, *, old_stay_dead: bool) -> None:
    worker = stage.workers[-1]
    assert worker.proxy is not None
    if seconds > LEASE:
        stage.strike(worker, worker.proxy.cut)
    else:
        worker.proxy.cut()
    time.sleep(seconds)
    worker.proxy.restore(old_stay_dead=old_stay_dead)


@scenario(quick=True, proxies=True)
def cut_short(stage: Stage, _options: Options) -> None:
    """A worker receives nothing from the server for 6 s; then the delayed bytes arrive."""
    _cut(stage, 6, old_stay_dead=False)


@scenario(proxies=True)
def cut_long(stage: Stage, _options: Options) -> None:
    """A worker receives nothing from the server for 25 s; its connections stay dead without an error."""
    _cut(stage, 25, old_stay_dead=True)


@scenario(proxies=True)
def cut_forgotten(stage: Stage, _options: Options) -> None:
    """A worker's connections die without an error; new ones work, as behind a replaced firewall."""
    _cut(stage, 1, old_stay_dead=True)


@scenario(quick=True, holds=False)
def rolling(stage: Stage, _options: Options) -> float:
    """The workers are replaced one after the other, by SIGTERM."""
    began = time.monotonic()
    for worker in stage.workers:
        _roll(stage, worker)
        time.sleep(1)
    return began


def _roll(stage: Stage, worker: Worker) -> None:
    old = worker.process
    old.send(signal.SIGTERM)
    stage.replace(worker)
    if code := old.wait(35):
        raise RuntimeError(f"a worker ended with {code} after SIGTERM")


@scenario(workers=[{"lease": lease} for lease in (120, 15, 2)])
def mixed_leases(stage: Stage, _options: Options) -> float:
    """Workers have leases of 2 minutes, 15 s and 2 s; each gets another lease; then one is killed."""
    time.sleep(20)
    stage.release_all()
    for worker, lease in zip(stage.workers, (2, 120, 5), strict=True):
        worker.settings["lease"] = lease
        _roll(stage, worker)
    stage.hold_each()
    time.sleep(10)
    stage.expect("tasks taken from live workers", stage.rescued, at_most=0)
    since = _kill(stage)
    # From now on, only the tasks of the killed worker may be rescued.
    stage.limits["rescued"] = stage.struck
    return since


@scenario(workers=[{"retry_limit": 0}] * WORKERS, holds=False)
def away_under_prefetched(stage: Stage, options: Options) -> None:
    """The server is down for 5 s while many tasks are prefetched, each with a single attempt."""
    stage.limits.update(failed=SLOTS, wasted=0)
    stage.add("ledger", 1_000)
    held = "SELECT count(*) FROM tasks WHERE state = 'running'"
    until(lambda: bool(stage.ask(held)[0][0] > 10 * SLOTS), 10)
    _restart(stage, options, signal.SIGINT)


@scenario(share=0.1, load={"settings": "-c synchronous_commit=local"})
def hanging_commits(stage: Stage, _options: Options) -> None:
    """The workers' commits hang for 80 s, because the synchronous standby is missing."""
    stage.limits["wasted"] = 0
    stage.server.set("synchronous_standby_names", "gone")
    try:
        time.sleep(80)
    finally:
        stage.server.set("synchronous_standby_names", "")


@scenario(share=0.1, proxies=True, speed=5e6)
def slow_link(stage: Stage, _options: Options) -> None:
    """Each worker's link has 5 MB/s, and 1,000 tasks of 200 KB are added at once."""

    def size() -> float:
        return max(memory(worker.process.pid) for worker in stage.workers)

    before = most = size()
    numbers = stage.add("noop", 1_000, padding="x" * 200_000)
    left = """
        SELECT count(*) FROM tasks
        WHERE (data->>'number')::bigint BETWEEN %s AND %s AND state <> 'completed'
    """

    def is_over() -> bool:
        nonlocal most
        most = max(most, size())
        return bool(stage.ask(left, numbers[0], numbers[-1])[0][0] == 0)

    # All links together need 13 s, a single one 40 s.
    with suppress(TimeoutError):
        until(is_over, 50)
    stage.expect("large tasks left after 50 s", stage.ask(left, numbers[0], numbers[-1])[0][0], at_most=0)
    stage.limits["claimed_again"] = len(numbers)
    stage.expect(f"growth of a worker's memory, from {before:.0f} MB, in MB", most - before, at_most=100)


@scenario()
def locked_table(stage: Stage, _options: Options) -> None:
    """apoq_tasks is locked for 75 s."""
    sessions = """
        SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
        AND usename = 'app' AND application_name <> 'offerer'
    """
    before = most = stage.ask(sessions)[0][0]
    with stage.server.admin(stage.name) as admin, admin.transaction():
        admin.execute("LOCK TABLE apoq_tasks IN ACCESS EXCLUSIVE MODE")
        deadline = time.monotonic() + 75
        while time.monotonic() < deadline:
            time.sleep(0.5)
            most = max(most, stage.ask(sessions)[0][0])
    stage.expect(f"additional sessions of the workers ({before} before)", most - before, at_most=12)


@scenario()
def clock(stage: Stage, _options: Options) -> float:
    """One worker's clock is an hour ahead, another's an hour behind; the first is killed after 10 s."""
    time.sleep(10)
    worker = stage.workers[0]
    since = stage.strike(worker, partial(worker.process.send, signal.SIGKILL))
    stage.replace(worker)
    return since


def _faketime(**how: str) -> dict[str, str]:
    """Return the environment of a program with a wrong clock."""
    libraries = list(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not libraries:
        raise Skipped("libfaketime is not installed")
    # The monotonic clock stays right, as on a real machine with a wrong clock.
    usual = {"LD_PRELOAD": str(libraries[0]), "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1"}
    return {**usual, **how}


def _clocks(_place: Place, server: Server, folder: Path, options: Options) -> dict[str, Any]:
    environments: list[dict[str, str]] = [_faketime(FAKETIME="+1h"), _faketime(FAKETIME="-1h"), {}]
    with Stage(server, "clock", folder, options.rate) as stage:
        return play(stage, clock, options, workers=[{"environment": one} for one in environments])


SCENARIOS["clock"] = Scenario(SCENARIOS["clock"].title, _clocks)


def clock_steps(place: Place, _server: Server, folder: Path, options: Options) -> dict[str, Any]:
    """The server's clock steps forward by an hour."""
    offset = place.folder / "offset"
    offset.write_text("+0\n")
    # Without the cache, or else each process of the server would see the step at a different time.
    environment = _faketime(FAKETIME_TIMESTAMP_FILE=str(offset), FAKETIME_NO_CACHE="1")

    def fault(stage: Stage, _options: Options) -> float:
        stage.limits.update(rescued=0, wasted=0)
        stepped = offset.with_suffix(".new")
        stepped.write_text("+3600\n")
        stepped.rename(offset)
        since = time.monotonic()
        time.sleep(10)
        return since

    server = Server(place, place.folder / folder.name, environment).create()
    try:
        with Stage(server, folder.name, folder, options.rate) as stage:
            return play(stage, fault, options)
    finally:
        server.stop()


def schema_dropped(_place: Place, server: Server, folder: Path, options: Options) -> dict[str, Any]:
    """One of the eight schemas of each worker is dropped under load, and created again."""
    others = ["a", "b", "c", "d", "e", "f"]

    def fault(stage: Stage, _options: Options) -> None:
        add = "INSERT INTO dropped.apoq_tasks (type) SELECT 'noop' FROM generate_series(1, 2000)"
        begun, left = (
            f"SELECT count(*) FROM dropped.apoq_tasks WHERE state <> '{state}'"
            for state in ("pending", "completed")
        )
        with stage.server.admin(stage.name) as admin:

            def drop() -> bool:
                with suppress(psycopg.errors.DeadlockDetected):
                    admin.execute("DROP SCHEMA dropped CASCADE")
                    return True
                return False

            admin.execute(add)
            until(lambda: bool(stage.ask(begun)[0][0]), 10)
            until(drop)
            stage.await_recovery(time.monotonic())
            stage.prepare("dropped")
            admin.execute(add)
            with suppress(TimeoutError):
                until(lambda: stage.ask(left)[0][0] == 0, 20)
        stage.expect("tasks left in the new schema", stage.ask(left)[0][0], at_most=0)

    with Stage(server, "schema_dropped", folder, options.rate, others) as stage:
        stage.prepare("dropped")
        return play(stage, fault, options, workers=[{"schemas": [None, *others, "dropped"]}] * WORKERS)


def _failover(
    place: Place, folder: Path, options: Options, fault: Callable[[Server, Stage, Options], None]
) -> dict[str, Any]:
    """Make a fault of a primary and its synchronous standby; all processes connect through proxies."""
    primary = Server(place, place.folder / folder.name).create()
    standby = Server(place, place.folder / f"{folder.name}_standby").create_as_standby(primary)
    try:
        with Stage(primary, folder.name, folder, options.rate) as stage:
            stage.lead_all_by_proxy()
            return play(stage, partial(fault, standby), options, proxies=True)
    finally:
        primary.stop()
        standby.stop()


def _lead_to(stage: Stage, server: Server) -> None:
    stage.server = server
    for proxy in (stage.load_proxy, *(worker.proxy for worker in stage.workers)):
        assert proxy is not None
        proxy.lead_to(server.port)


def failover(place: Place, _server: Server, folder: Path, options: Options) -> dict[str, Any]:
    """The primary crashes; its standby is promoted, and all connections are led to it."""

    def fault(standby: Server, stage: Stage, _options: Options) -> None:
        stage.server.stop(signal.SIGQUIT)
        time.sleep(2)
        standby.promote()
        _lead_to(stage, standby)

    return _failover(place, folder, options, fault)


def failover_readonly(place: Place, _server: Server, folder: Path, options: Options) -> dict[str, Any]:
    """All connections are led to the standby, which is read-only for 5 s and then promoted."""

    def fault(standby: Server, stage: Stage, _options: Options) -> None:
        primary = stage.server
        _lead_to(stage, standby)
        time.sleep(5)
        primary.stop()
        standby.promote()

    return _failover(place, folder, options, fault)


def pgbouncer(place: Place, server: Server, folder: Path, options: Options) -> dict[str, Any]:
    """The workers' PgBouncer, in transaction mode, is restarted by SIGTERM, and 5 s later by SIGKILL."""
    if not PGBOUNCER.exists():
        raise Skipped("PgBouncer is not installed")
    port = free_port()
    users, settings = place.folder / "users.txt", place.folder / "pgbouncer.ini"
    users.write_text('"app" ""\n')
    settings.write_text(
        f"[databases]\n* = host=127.0.0.1 port={server.port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
        f"listen_port = {port}\nunix_socket_dir =\nauth_type = trust\nauth_file = {users}\n"
        "pool_mode = transaction\n"
    )

    def start() -> Any:
        return place.start(place.folder / "pgbouncer.log", PGBOUNCER, settings, ends_by=signal.SIGKILL)

    running = start()

    def fault(_stage: Stage, _options: Options) -> None:
        nonlocal running
        for number in (signal.SIGTERM, signal.SIGKILL):
            end(running, number)
            time.sleep(2)
            running = start()
            time.sleep(5 if number == signal.SIGTERM else 0)

    with Stage(server, "pooled", folder, options.rate) as stage:
        stage.pooler_port = port
        try:
            return play(stage, fault, options)
        finally:
            end(running, signal.SIGKILL)


def disk_full(place: Place, _server: Server, folder: Path, options: Options) -> dict[str, Any]:
    """The server's disk is full for 6 s; if the server ended, it is started when there is space."""

    def fault(stage: Stage, _options: Options) -> None:
        filler = small / "filler"
        deadline = time.monotonic() + 6
        while time.monotonic() < deadline:
            fill(filler)
            time.sleep(0.2)
        filler.unlink()
        if not stage.server.is_running:
            stage.server.start()

    with place.small_disk(400) as small:
        server = Server(place, small / "data").create()
        try:
            with Stage(server, "disk_full", folder, options.rate) as stage:
                return play(stage, fault, options)
        finally:
            server.stop()


def hour(_place: Place, server: Server, folder: Path, options: Options) -> dict[str, Any]:
    """Random faults, one after the other, for --minutes; the first worker is spared."""
    chance = random.Random(options.seed)  # noqa: S311 - no secret
    faults: tuple[Fault, ...] = (
        sigkill,
        zombie,
        restart_fast,
        restart_immediate,
        terminate,
        exhausted,
        cut_short,
        cut_long,
    )
    with Stage(server, "hour", folder, options.rate) as stage:
        stage.begin(proxies=True)
        spared = stage.workers[0].process
        deadline = time.monotonic() + options.minutes * 60
        time.sleep(min(60, options.minutes * 10))
        begin = memory(spared.pid)
        while time.monotonic() < deadline:
            # The faults affect the last worker.
            stage.workers[1:] = chance.sample(stage.workers[1:], 2)
            fault = chance.choice(faults)
            stage.log(fault.__name__)
            strike(stage, fault, options)
            time.sleep(chance.uniform(2, 15))
        growth = memory(spared.pid) - begin
        stage.expect(f"growth of the spared worker's memory, from {begin:.0f} MB, in MB", growth, at_most=20)
        return stage.finish()


for function in (clock_steps, schema_dropped, failover, failover_readonly, pgbouncer, disk_full, hour):
    assert function.__doc__
    SCENARIOS[function.__name__] = Scenario(function.__doc__, function, is_default=function is not hour)
