"""Sends the log of child processes to the handlers of their worker's process."""

from __future__ import annotations

import logging
from collections.abc import Callable

from apoq.worker.isolation.messages import Logged
from apoq.worker.isolation.outcomes import error_of, raised


class Forwarder(logging.Handler):
    """A handler that sends records to the worker."""

    def __init__(self, send: Callable[[Logged], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record, with its message formatted."""
        try:
            error = record.exc_info[1] if record.exc_info else None
            known = None if error is None else raised(error)
            values = (record.name, record.levelno, record.getMessage(), known)
            place = (record.pathname, record.lineno, record.funcName, record.threadName)
            self._send(Logged(*values, record.created, record.process, *place))
        except Exception:  # noqa: BLE001 - as in the handlers of the standard library
            self.handleError(record)


def forward(send: Callable[[Logged], None], level: int) -> None:
    """Send the records of all loggers of this process, from this level on."""
    root = logging.getLogger()
    root.addHandler(Forwarder(send))
    root.setLevel(level)


def handle(logged: Logged) -> None:
    """Handle a child's record as one of this process."""
    logger = logging.getLogger(logged.name)
    if logger.isEnabledFor(logged.level):
        error = None if logged.error is None else error_of(logged.error)
        record = logging.makeLogRecord(
            {
                "name": logged.name,
                "levelno": logged.level,
                "levelname": logging.getLevelName(logged.level),
                "msg": logged.text,
                "args": None,
                "exc_info": error and (type(error), error, None),
                "created": logged.created,
                "msecs": logged.created % 1 * 1000,
                "process": logged.process,
                "pathname": logged.path,
                "lineno": logged.line,
                "funcName": logged.function,
                "threadName": logged.thread,
            }
        )
        logger.handle(record)
