"""A pipe by which a child process ends with its worker, also in the middle of a C function."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress

if sys.platform == "linux":
    import fcntl


def end_with(lifeline: int) -> None:
    """Let the kernel kill this process group when the other end of the pipe is closed: the worker has died.

    The thread that reads the connection does so, too, but it can't while a C function holds the interpreter's
    lock. Not by PR_SET_PDEATHSIG, which sends the signal at the end of the thread that started this process.
    Systems other than Linux have no way to choose the signal.
    """
    if sys.platform == "linux":
        with suppress(OSError):  # not all that look like Linux can do it
            fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgid(0))
            fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
            fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
