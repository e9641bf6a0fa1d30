"""What tests may see of a worker's inside: the only place that knows where its parts are."""

from __future__ import annotations

from apoq import AsyncRunningTask, RunningTask, Worker
from apoq.worker.execution.attempt import AnyAttempt
from apoq.worker.lifecycle import Lifecycle
from apoq.worker.runtime import Runtime


def lifecycle(worker: Worker) -> Lifecycle:
    """Return what registers a worker."""
    return worker._lifecycle


def runtime(worker: Worker) -> Runtime:
    """Return the parts of a worker."""
    return worker._lifecycle.runtime


def attempt_of(task: RunningTask | AsyncRunningTask) -> AnyAttempt:
    """Return the worker's part of a running task."""
    return task._attempt
