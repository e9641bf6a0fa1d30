"""Tasks at home in Pyramid: added in the request's transaction, processed with a request of their own.

.. code-block:: python

    config.include("apoq.pyramid")
"""

from __future__ import annotations

import configparser
from typing import Any

from plaster import PlasterError
from pyramid.config import global_registries
from pyramid.events import ApplicationCreated, NewRequest
from pyramid.exceptions import ConfigurationError
from pyramid.paster import get_app, setup_logging
from pyramid.registry import Registry

from apoq.pyramid.application import Application
from apoq.pyramid.requests import RequestTasks
from apoq.pyramid.settings import Misconfigured
from apoq.pyramid.tasks import add_apoq_queue, add_apoq_task, apoq_task
from apoq.worker import Worker

__all__ = ["Misconfigured", "apoq_task", "includeme", "load_worker", "make_worker"]


def includeme(config: Any) -> None:
    """Give an application `request.apoq`, `config.add_apoq_task`, and what its settings ask for."""
    application = Application(config.registry)
    application.enter()
    config.add_directive("add_apoq_task", add_apoq_task)
    config.add_directive("add_apoq_queue", add_apoq_queue)
    config.add_request_method(_request_tasks, "apoq", reify=True)
    if application.settings.in_process_worker:
        config.add_subscriber(application.embed, ApplicationCreated)
        config.add_subscriber(application.serve, NewRequest)


def _request_tasks(request: Any) -> RequestTasks:
    application = Application.of(request.registry)
    return RequestTasks(request, application.settings, application.in_process)


def make_worker(registry: Registry) -> Worker:
    """Make a worker with an application's processors, as its settings say.

    Each task is processed with a request of its own. Raises `Misconfigured` where the application doesn't
    include ``apoq.pyramid``, or has no session.
    """
    return Application.of(registry).make_worker()


def load_worker(config_uri: str) -> Worker:
    """Make the worker of the application in an ini file (``development.ini``, or ``…#section``).

    Logging is set up as the file says. Raises `Misconfigured` where the file can't be used, and whatever the
    application raises while it is made.
    """
    try:
        setup_logging(config_uri)
        get_app(config_uri, options={"__script__": "apoq"})
        # Not the app's own: in the file, it may be wrapped into filters.
        return make_worker(global_registries.last)
    except Misconfigured:
        raise
    except configparser.InterpolationError as error:
        # Its message has the value in it, which may be a URL with a password.
        raise Misconfigured(
            f"{config_uri}: {error.option} in [{error.section}] can't be read: write a % as %%, and say what "
            "each %(name)s refers to"
        ) from None
    except (configparser.Error, ConfigurationError, OSError, LookupError, PlasterError) as error:
        if isinstance(error, KeyError | IndexError):
            raise  # the application's own
        raise Misconfigured(f"{config_uri}: {error}") from error
