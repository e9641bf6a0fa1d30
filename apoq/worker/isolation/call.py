"""An attempt in a child process, as its slot sees it."""

from __future__ import annotations

import math
import time
from typing import Final

from apoq.core.progress import Report
from apoq.schema.statements.claim import CLAIM
from apoq.worker.execution.attempt import LOST, IsolatedAttempt
from apoq.worker.execution.runner import TaskLost, overdue
from apoq.worker.isolation.child_process import ChildProcess
from apoq.worker.isolation.log_records import handle
from apoq.worker.isolation.messages import (
    Begun,
    Completing,
    End,
    Ended,
    FromChild,
    Logged,
    MayComplete,
    Progress,
    Run,
    Stop,
)

BEGIN_SECONDS: Final = 60.0
"""Seconds in which a child must have started, and have imported the module of the function."""

INTERRUPTION_SECONDS: Final = 2.0
"""Seconds that a function has to end after it was interrupted, before its process is killed."""

CHECK_SECONDS: Final = 0.1
"""Seconds between two checks whether the task must stop."""


class Call:
    """One attempt in a child, from its request to its outcome or the death of the child."""

    def __init__(self, attempt: IsolatedAttempt, child: ChildProcess) -> None:
        self._attempt = attempt
        self._child = child
        self._limit = attempt.timeout
        self.has_begun = False
        """Whether the function may have been called."""
        self.interrupted_by: BaseException | None = None
        """The reason for which the function was interrupted."""
        self._knows_of_stop = False
        self._ends_at = time.monotonic() + BEGIN_SECONDS
        self._kills_at = math.inf

    def run(self, request: Run) -> Ended | None:
        """Let the child run the attempt; return how it has ended, or None if the child has died."""
        self._attempt.kill = self._child.kill
        try:
            self._child.send(request)
            while True:
                self._look()
                message = self._child.receive(self._patience())
                if isinstance(message, Ended):
                    return message
                self._hear(message)
        except (EOFError, OSError):
            return None
        finally:
            self._attempt.kill = _do_nothing

    def _hear(self, message: FromChild | None) -> None:
        match message:
            case Begun():
                self.has_begun = True
                self._ends_at = math.inf
                if self._limit is not None:
                    self._attempt.ends_at = self._ends_at = time.monotonic() + self._limit
            case Progress(done=done, total=total, note=note):
                on_progress = self._attempt.row[CLAIM].on_progress
                if on_progress is not None and self._attempt.may_report:
                    on_progress(self._attempt, Report(done, total, note))
            case Logged():
                handle(message)
            case Completing():
                is_allowed = self.interrupted_by is None and self._attempt.let_complete()
                if is_allowed:
                    self._ends_at = math.inf
                self._child.send(MayComplete(is_allowed))

    def _look(self) -> None:
        """Tell the child what has happened meanwhile."""
        attempt, now = self._attempt, time.monotonic()
        if attempt.is_cut_off or now >= self._kills_at:
            self._child.kill()
        elif self.interrupted_by is None and not attempt.is_completing:
            if attempt.signal is LOST:
                self._interrupt(TaskLost())
            elif now >= self._ends_at:
                self._interrupt(self._overdue())
        if attempt.signal.is_given and not self._knows_of_stop:
            self._knows_of_stop = True
            self._child.send(Stop())

    def _interrupt(self, reason: BaseException) -> None:
        self.interrupted_by = reason
        self._kills_at = time.monotonic() + INTERRUPTION_SECONDS
        self._child.send(End())

    def _overdue(self) -> TimeoutError:
        if self.has_begun:
            return overdue(self._limit or 0.0)
        return TimeoutError(
            f"the process of the task has not imported its function within {BEGIN_SECONDS:g} s: import less "
            "in its module"
        )

    def _patience(self) -> float:
        left = min(self._ends_at, self._kills_at) - time.monotonic()
        return max(0.0, min(CHECK_SECONDS, left))


def _do_nothing() -> None:
    pass
