"""Starts a database and a mail server unless the environment has them, the worker, and the web server."""

import logging
import os
import socket
from contextlib import ExitStack

from aiosmtpd.controller import Controller
from aiosmtpd.handlers import Debugging
from django.core.management import call_command

from apoq.embedded import database

logging.basicConfig(level=logging.INFO, format="%(message)s")
for name in ("mail.log", "alembic"):
    logging.getLogger(name).setLevel(logging.WARNING)

with ExitStack() as stack:
    os.environ.update(DATABASE_URL=stack.enter_context(database()), DEBUG="1")
    if "SMTP_PORT" not in os.environ:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        mail_server = Controller(Debugging(), hostname="127.0.0.1", port=port)  # prints each message
        mail_server.start()
        stack.callback(mail_server.stop)
        os.environ.update(SMTP_HOST=mail_server.hostname, SMTP_PORT=str(mail_server.port))
    from mysite.worker import worker  # reads these settings

    call_command("migrate")
    worker.start()
    stack.callback(worker.stop)
    call_command("runserver", f"127.0.0.1:{os.environ.get('PORT', '8000')}", use_reloader=False)
