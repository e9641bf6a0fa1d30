"""What runs tasks."""

from apoq.worker.running import AsyncRunningTask, RunningTask
from apoq.worker.worker import Worker

__all__ = ["AsyncRunningTask", "RunningTask", "Worker"]
