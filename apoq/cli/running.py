"""Run a worker as a program: in this process, or in supervised child processes."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, Final

import click

from apoq.cli import logs
from apoq.cli.burst import Burst
from apoq.cli.ending import Ending
from apoq.cli.exits import BadUsage, explained
from apoq.cli.reload import Reloader
from apoq.cli.serving import HEALTH_PORT, LOOPBACK, METRICS_PORT, port, serve
from apoq.cli.status import STATUS_INTERVAL_SECONDS, Status, every, is_wanted
from apoq.cli.stopping import StopNotice, again_by
from apoq.cli.supervisor import Supervisor, again, check_platform, obey, report, take_lifeline, take_number
from apoq.cli.values import patience
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
    metrics_port: int | None = None,
    health_port: int | None = None,
    bind: str = LOOPBACK,
    tracing: Relation | None = None,
) -> None:
    """Run the worker that `make` returns until SIGINT or SIGTERM; a second signal ends the program at once.

    With `processes` or `reload`, this process starts its own command line again as child processes, and only
    they call `make`.
    """
    _check(processes, burst=burst, reload=reload)
    end_as_pid_1()
    lifeline, number = take_lifeline(), take_number()
    if lifeline is None and (processes is not None or reload):
        check_platform("--reload" if reload else "--processes")
        logs.set_up(log_format, log_level)
        sys.exit(_supervise(processes, timeout))
    ending = Ending(timeout)
    if lifeline is not None:
        obey(lifeline, ending.stop)
    worker = make()
    logs.set_up(log_format, log_level)
    _adjust(worker, queues, concurrency, has_metrics=metrics_port is not None, tracing=tracing)
    _say_what_runs(worker)
    servers = serve(worker, metrics_port=metrics_port, health_port=health_port, bind=bind, number=number)
    for server in servers:
        logger.info("%s at %s", " and ".join(server.names), server.url)
    # For a second Ctrl-C, because the first one is caught.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    status = Status()
    until_done = Burst(worker) if burst else None

    def begin(stop: Callable[[], None]) -> None:
        if lifeline is not None:
            report(lifeline, worker)
            return
        _say_what_a_stop_waits_for(worker, timeout)
        if is_wanted():
            every(STATUS_INTERVAL_SECONDS, lambda: status.say(worker.stats()))
        if until_done is not None:
            until_done.watch(stop)

    with caught() as signals, ending.watch(signals):
        worker._run_until(signals, timeout, on_start=begin, on_stop=ending.begin)  # noqa: SLF001 - our own
    if lifeline is None and is_wanted():
        status.say(worker.stats())
    if until_done is not None:
        until_done.finish()


def _check(processes: int | None, *, burst: bool, reload: bool) -> None:
    given = [
        option
        for option, is_given in (
            ("--processes", processes is not None),
            ("--burst", burst),
            ("--reload", reload),
        )
        if is_given
    ]
    if len(given) > 1:
        raise BadUsage(f"{' and '.join(given)} can't be combined: leave out one of them")


def _supervise(processes: int | None, timeout: float) -> int:
    if processes is not None:
        return Supervisor(again(), processes, timeout=timeout).run()
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
) -> None:
    try:
        with explained():
            worker._adjust(  # noqa: SLF001 - our own
                queues=None if queues is None else _names(queues),
                concurrency=concurrency,
                has_metrics=has_metrics,
                tracing=tracing,
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
