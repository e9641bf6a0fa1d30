"""Integration with Pyramid: tasks in the request's transaction, and a request for each processor.

.. code-block:: python

    config.include("apoq.pyramid")
"""

from __future__ import annotations

import configparser
from typing import Any

from plaster import PlasterError, get_loader
from pyramid.config import global_registries
from pyramid.events import ApplicationCreated, NewRequest
from pyramid.exceptions import ConfigurationError
from pyramid.registry import Registry

from apoq.pyramid.application import Application
from apoq.pyramid.requests import RequestTasks
from apoq.pyramid.settings import Misconfigured
from apoq.pyramid.tasks import add_apoq_queue, add_apoq_task, apoq_task
from apoq.worker import Worker

__all__ = ["Misconfigured", "apoq_task", "includeme", "load_worker", "make_worker"]


def includeme(config: Any) -> None:
    """Add `request.apoq`, `config.add_apoq_task` and `config.add_apoq_queue`; called by `config.include`.

    With the setting ``apoq.in_process_worker``, it also starts a worker at the first request.

    Args:
        config: The configurator.

    Raises:
        Misconfigured: If a setting is invalid.
    """
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
    """Create a worker with the processors and the settings of an application. It is not started.

    Each task is processed with a new request.

    Args:
        registry: The application's registry, such as ``app.registry``.

    Returns:
        The worker.

    Raises:
        Misconfigured: If the application doesn't include ``apoq.pyramid``, has no session, or has a typed
            task that is a coroutine function.
    """
    return Application.of(registry).make_worker()


def load_worker(config_uri: str) -> Worker:
    """Create the application of an ini file, and its worker, which is not started.

    Logging is set up as the file configures it, if it does.

    Args:
        config_uri: The file, such as ``development.ini`` or ``development.ini#section``.

    Returns:
        The worker.

    Raises:
        Misconfigured: If the file can't be used; also what `make_worker` raises. Other exceptions come from
            the application.
    """
    try:
        loader = get_loader(config_uri, ["wsgi"])
        if "loggers" in loader.get_sections():  # without it, setup_logging would show only warnings
            loader.setup_logging()
        earlier = list(global_registries)
        _app = loader.get_wsgi_app(None, {"__script__": "apoq"})  # kept, for its registry is held weakly
        # Not `app.registry`, because filters in the file may wrap the application.
        created = [each for each in global_registries if not any(each is one for one in earlier)]
        return make_worker(_with_apoq(created, config_uri) or global_registries.last)
    except Misconfigured:
        raise
    except configparser.InterpolationError as error:
        # Without its message, which contains the value, such as a URL with a password.
        raise Misconfigured(
            f"{config_uri}: {error.option} in [{error.section}] can't be read: write % as %%, and define "
            "each name in %(name)s"
        ) from None
    except (configparser.Error, ConfigurationError, OSError, LookupError, PlasterError) as error:
        if isinstance(error, KeyError | IndexError):
            raise  # a bug of the application
        raise Misconfigured(f"{config_uri}: {error}") from error


def _with_apoq(registries: list[Registry], config_uri: str) -> Registry | None:
    """Return the one that includes apoq, or None; raise `Misconfigured` if there are several."""
    found = [registry for registry in registries if Application.is_in(registry)]
    if len(found) > 1:
        raise Misconfigured(
            f"{config_uri} must be one application with apoq, got {len(found)}: give one, as in "
            f"{config_uri.partition('#')[0]}#shop"
        )
    return found[0] if found else None
