"""Starts a database and a mail server unless the environment has them, the worker, and the web server."""

import logging
import os
import socket
from contextlib import ExitStack

from aiosmtpd.controller import Controller
from aiosmtpd.handlers import Debugging
from app import apoq, create_app
from flask_migrate import upgrade

from apoq.embedded import database

logging.basicConfig(level=logging.INFO, format="%(message)s")
logging.getLogger("mail.log").setLevel(logging.WARNING)

with ExitStack() as stack:
    os.environ["DATABASE_URL"] = stack.enter_context(database())
    if "SMTP_PORT" not in os.environ:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        mail_server = Controller(Debugging(), hostname="127.0.0.1", port=port)  # prints each message
        mail_server.start()
        stack.callback(mail_server.stop)
        os.environ.update(SMTP_HOST=mail_server.hostname, SMTP_PORT=str(mail_server.port))
    app = create_app()
    with app.app_context():
        upgrade()
        apoq.worker.start()
        stack.callback(apoq.worker.stop)
    app.run(port=int(os.environ.get("PORT", "5000")))
