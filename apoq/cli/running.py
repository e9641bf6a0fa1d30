"""Run a worker as a program: in this process, or in supervised child processes."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import reduce
from pathlib import Path
from typing import Any, Final

import click

from apoq.cli import logs
from apoq.cli.burst import Burst
from apoq.cli.ending import Ending
from apoq.cli.exits import BadUsage, explained
from apoq.cli.lifeline import Lifeline
from apoq.cli.reload import Reloader
from apoq.cli.serving import HEALTH_PORT, LOOPBACK, METRICS_PORT, Serving, check_ports, port
from apoq.cli.status import STATUS_INTERVAL_SECONDS, Status, every, is_wanted
from apoq.cli.stopping import StopNotice, again_by
from apoq.cli.supervisor import Supervisor, again, check_platform
from apoq.cli.values import lifetime, memory, patience
from apoq.events import WorkerStopping
from apoq.tracing import CHILD, LINK, Relation
from apoq.worker import Worker
from apoq.worker.signals import caught, end_as_pid_1
from apoq.worker.worker import STOP_TIMEOUT

logger = logging.getLogger(__name__)

MAX_NAMED: Final = 20
"""How many types of tasks the log names for a queue."""

_OPTIONS = (
    click.option(
        "--concurrency",
        type=click.IntRange(min=1),
        metavar="N",
        help="How many tasks run at once, in each process. Default: the worker's own, or 4.",
    ),
    click.option("--queues", metavar="A,B", help="Only those of the worker's queues that have these names."),
    click.option(
        "--processes",
        type=click.IntRange(min=1),
        metavar="N",
        help="Run N processes, and replace those that die.",
    ),
    click.option(
        "--max-tasks",
        type=click.IntRange(min=1),
        metavar="N",
        help="Replace a process when so many attempts have ended in it. This limit and the next two are "
        "varied by up to 20 % for each process, and start a supervisor, as --processes does.",
    ),
    click.option(
        "--max-memory",
        type=memory,
        metavar="SIZE",
        help="Replace a process that uses so much memory, such as 512M or 2G.",
    ),
    click.option(
        "--max-age",
        type=lifetime,
        metavar="DURATION",
        help="Replace a process that has run for so long, such as 6h.",
    ),
    click.option(
        "--burst", is_flag=True, help="Run the tasks that are due, and exit when there are none left."
    ),
    click.option(
        "--reload",
        is_flag=True,
        help="For development: restart the worker when a Python file in this directory changes.",
    ),
    click.option(
        "--timeout",
        type=patience,
        default=STOP_TIMEOUT.total_seconds(),
        show_default=True,
        metavar="SECONDS",
        help="How long to wait for running tasks on shutdown, such as 25 or 2m; then they are given back.",
    ),
    click.option(
        METRICS_PORT,
        type=port,
        metavar="PORT",
        help="Serve the worker's metrics for Prometheus at /metrics. With --processes, each process has its "
        "own port: this one, and those that follow.",
    ),
    click.option(
        HEALTH_PORT,
        type=port,
        metavar="PORT",
        help="Serve health checks at /live and /ready; may be the same port. With --processes, as above.",
    ),
    click.option(
        "--bind",
        default=LOOPBACK,
        show_default=True,
        metavar="ADDRESS",
        help="The address of these ports; 0.0.0.0 for all.",
    ),
    click.option(
        "--tracing",
        type=click.Choice((LINK, CHILD)),
        help="Run each attempt in a span of OpenTelemetry, with a link to the span in which the task was "
        "added, or as its child.",
    ),
    click.option("--log-format", type=click.Choice(logs.FORMATS), help="Default: text."),
    click.option(
        "--log-level",
        type=click.Choice(logs.LEVELS),
        help="Default: info. With debug, each task is logged when it starts and ends.",
    ),
)


def worker_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of `run_worker` to a command."""
    return reduce(lambda decorated, option: option(decorated), reversed(_OPTIONS), function)


def run_worker(
    make: Callable[[], Worker],
    *,
    concurrency: int | None,
    queues: str | None,
    processes: int | None,
    burst: bool,
    reload: bool,
    timeout: float,
    log_format: str | None,
    log_level: str | None,
    max_tasks: int | None = None,
    max_memory: int | None = None,
    max_age: timedelta | None = None,
    metrics_port: int | None = None,
    health_port: int | None = None,
    bind: str = LOOPBACK,
    tracing: Relation | None = None,
) -> None:
    """Run the worker that `make` returns until SIGINT or SIGTERM; a second signal ends the program at once.

    With `processes`, `reload` or a limit, this process starts its own command line again as child processes,
    and only they call `make`.
    """
    limits = {"max_tasks": max_tasks, "max_memory": max_memory, "max_age": max_age}
    supervising = _supervising(processes, limits, burst=burst, reload=reload)
    check_ports(processes or 1, metrics_port, health_port)
    end_as_pid_1()
    lifeline = Lifeline.take()
    if lifeline is None and supervising is not None:
        check_platform(supervising)
        logs.set_up(log_format, log_level)
        sys.exit(_supervise(processes, timeout, reload=reload))
    ending = Ending(timeout)
    serving = Serving() if lifeline is None else Serving(lifeline.number, waits=lifeline.is_successor)
    if lifeline is not None:

        def drain() -> None:
            serving.close()  # the successor takes over the ports
            ending.drain()

        lifeline.obey(drain=drain, stop=ending.stop)
    worker = make()
    logs.set_up(log_format, log_level)
    _adjust(
        worker,
        queues,
        concurrency,
        has_metrics=metrics_port is not None,
        tracing=tracing,
        # A burst ends when no more tasks are due, and not before.
        limits={name: limit for name, limit in limits.items() if burst or limit is not None},
    )
    _say_what_runs(worker)
    serving.begin(worker, metrics_port=metrics_port, health_port=health_port, bind=bind)
    # For a second Ctrl-C, because the first one is caught.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    status = Status()
    until_done = Burst(worker) if burst else None

    def begin(stop: Callable[[], None]) -> None:
        if lifeline is not None:
            lifeline.report(worker)
            return
        _say_what_a_stop_waits_for(worker, timeout)
        if is_wanted():
            every(STATUS_INTERVAL_SECONDS, lambda: status.say(worker.stats()))
        if until_done is not None:
            until_done.watch(stop)

    with caught() as signals, ending.watch(signals):
        worker._run_until(  # noqa: SLF001 - our own
            signals,
            timeout,
            on_start=begin,
            on_stop=ending.begin,
            on_limit=None if lifeline is None else lambda event: lifeline.ask_for_successor(event.limit),
        )
    if lifeline is None and is_wanted():
        status.say(worker.stats())
    if until_done is not None:
        until_done.finish()


def _supervising(
    processes: int | None, limits: Mapping[str, object], *, burst: bool, reload: bool
) -> str | None:
    """Return the option that needs a supervisor; None without one. Fail if options can't be combined."""
    limited = next((f"--{name.replace('_', '-')}" for name, its in limits.items() if its is not None), None)
    several = limited if processes is None else "--processes"
    given = [several, "--burst" if burst else None, "--reload" if reload else None]
    options = [option for option in given if option is not None]
    if len(options) > 1:
        raise BadUsage(f"{' and '.join(options)} can't be combined: leave out one of them")
    return "--reload" if reload else several


def _supervise(processes: int | None, timeout: float, *, reload: bool) -> int:
    if not reload:
        return Supervisor(again(), processes or 1, timeout=timeout).run()
    reloader = Reloader(again(), Path.cwd(), timeout=timeout)
    reloader.watch()
    return reloader.run()


def _adjust(
    worker: Worker,
    queues: str | None,
    concurrency: int | None,
    *,
    has_metrics: bool,
    tracing: Relation | None,
    limits: Mapping[str, object],
) -> None:
    try:
        with explained():
            worker._adjust(  # noqa: SLF001 - our own
                queues=None if queues is None else _names(queues),
                concurrency=concurrency,
                has_metrics=has_metrics,
                tracing=tracing,
                limits=limits,
            )
    except ValueError as error:
        raise BadUsage(str(error)) from error
    if not worker.types:
        raise BadUsage(
            "this worker has no tasks to run: import the modules that define them (@queue.task), or give it "
            "processors (worker.use)"
        )


def _say_what_runs(worker: Worker) -> None:
    for queue in worker.queues:
        if types := sorted(worker.processors(queue)):
            named = ", ".join(types[:MAX_NAMED]) + (
                f" and {len(types) - MAX_NAMED:,} more" if len(types) > MAX_NAMED else ""
            )
            schema = "" if queue.schema is None else f" in the schema {queue.schema!r}"
            logger.info("queue %r%s: runs %s", queue.name, schema, named)


def _say_what_a_stop_waits_for(worker: Worker, timeout: float) -> None:
    notice = StopNotice(timeout, lambda: worker.stats().running, ends_at_once=again_by())

    def begin(_event: WorkerStopping) -> None:
        notice.begin()
        notice.renew_until_the_end()

    worker.events.on(WorkerStopping, begin)


def _names(queues: str) -> list[str]:
    return [name.strip() for name in queues.split(",") if name.strip()]
