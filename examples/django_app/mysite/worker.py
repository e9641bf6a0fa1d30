"""The worker: run it with `apoq worker mysite.worker:worker`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import django
from sqlalchemy import URL, create_engine

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mysite.settings")
django.setup()

# After django.setup(), because these import models.
from django.conf import settings  # noqa: E402
from django.db import close_old_connections  # noqa: E402
from signup.tasks import queue  # noqa: E402

from apoq import RunningTask, Worker  # noqa: E402


@contextmanager
def fresh_connections(_task: RunningTask) -> Iterator[None]:
    """Close old connections before and after each task, as Django does for each request."""
    close_old_connections()
    try:
        yield
    finally:
        close_old_connections()


database = settings.DATABASES["default"]
url = URL.create(
    "postgresql+psycopg",
    username=database["USER"] or None,
    password=database["PASSWORD"] or None,
    host=database["HOST"] or None,
    port=database["PORT"] or None,
    database=database["NAME"],
)
worker = Worker(create_engine(url), queue, middleware=fresh_connections)
