"""Workers, which run tasks."""

from apoq.worker.execution.running_task import AsyncRunningTask, RunningTask
from apoq.worker.worker import Worker

__all__ = ["AsyncRunningTask", "RunningTask", "Worker"]
