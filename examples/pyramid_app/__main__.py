"""Starts a database and a mail server unless the environment has them, the worker, and the web server."""

import logging
import os
import socket
from contextlib import ExitStack
from pathlib import Path

import alembic.command
import alembic.config
from aiosmtpd.controller import Controller
from aiosmtpd.handlers import Debugging
from pyramid.paster import get_app, setup_logging
from waitress import serve

from apoq.embedded import database
from apoq.pyramid import make_worker

INI = str(Path(__file__).with_name("development.ini"))

with ExitStack() as stack:
    os.environ["DATABASE_URL"] = stack.enter_context(database())
    if "SMTP_PORT" not in os.environ:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        mail_server = Controller(Debugging(), hostname="127.0.0.1", port=port)  # prints each message
        mail_server.start()
        logging.getLogger("mail.log").setLevel(logging.WARNING)
        stack.callback(mail_server.stop)
        os.environ.update(SMTP_HOST=mail_server.hostname, SMTP_PORT=str(mail_server.port))

    setup_logging(INI)
    alembic.command.upgrade(alembic.config.Config(INI), "head")
    app = get_app(INI)
    worker = make_worker(app.registry)
    worker.start()
    stack.callback(worker.stop)
    serve(app, host="127.0.0.1", port=int(os.environ.get("PORT", "6543")))
