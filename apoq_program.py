"""The program `apoq`."""

import os
import signal


def main() -> None:
    """Run the command line; as PID 1, so that signals end it from the first moment.

    The kernel drops them for PID 1, such as a container's, unless there is a handler. And in a container that
    has little of a processor, to import apoq takes a second or more.
    """
    if os.getpid() == 1:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, lambda number, _frame: os._exit(128 + number))

    from apoq.cli import main  # not before that

    main()
