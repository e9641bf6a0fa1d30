"""Starts a database and a mail server unless the environment has them, and a web server with a worker."""

import logging
import os
import socket
from contextlib import ExitStack
from pathlib import Path

import alembic.command
import uvicorn
from aiosmtpd.controller import Controller
from aiosmtpd.handlers import Debugging
from alembic.config import Config

from apoq.embedded import database

logging.basicConfig(level=logging.INFO, format="%(message)s")
logging.getLogger("mail.log").setLevel(logging.WARNING)

with ExitStack() as stack:
    os.environ.update(DATABASE_URL=stack.enter_context(database()), IN_PROCESS_WORKER="1")
    if "SMTP_PORT" not in os.environ:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        mail_server = Controller(Debugging(), hostname="127.0.0.1", port=port)  # prints each message
        mail_server.start()
        stack.callback(mail_server.stop)
        os.environ.update(SMTP_HOST=mail_server.hostname, SMTP_PORT=str(mail_server.port))
    alembic.command.upgrade(Config(Path(__file__).parent / "alembic.ini"), "head")
    uvicorn.run("app:app", port=int(os.environ.get("PORT", "8000")))
