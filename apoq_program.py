"""The program `apoq`."""

import os
import signal


def main() -> None:
    """Run the command line. As PID 1, handle signals before the imports.

    For PID 1, such as the program of a container, the kernel ignores signals that have no handler. Importing
    apoq can take a second or more in a container with a small share of a CPU.
    """
    if os.getpid() == 1:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, lambda number, _frame: os._exit(128 + number))

    from apoq.cli import main  # after the handlers are set

    main()
