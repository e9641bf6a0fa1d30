"""The example applications: installed from the wheel, driven over HTTP, their mails counted.

A test module says which example it is, and inherits what every one of them is to do:

    from applications.harness import Example, Scenario

    EXAMPLE = Example(
        folder="flask_app",
        extras="binary,embedded,flask",
        migrate=["flask", "db", "upgrade"],
        web=["gunicorn", "--bind", "127.0.0.1:{port}", "app:create_app()"],
        worker=["flask", "apoq", "worker"],
    )

    class TestTheApplication(Scenario):
        def test_something_of_its_own(self, site): ...

Its commands run in a copy of the example's folder, with ``DATABASE_URL``, ``SMTP_HOST``, ``SMTP_PORT`` and,
for the web server, ``PORT``. A test may also ask for `application`, `site`, `worker` and `mailbox` itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import sqlalchemy as sa

pytest.register_assert_rewrite("applications.harness", "applications.imports")

from applications.harness import (  # noqa: E402
    ROOT,
    UV,
    Application,
    Mailbox,
    Process,
    Site,
    free_port,
    install,
    succeed,
    until,
)
from applications.imports import Calls, Importing, ImportSite  # noqa: E402

INSTALLED = pytest.StashKey[Application]()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    if UV:
        succeed(UV, "build", "--quiet", "--wheel", "--out-dir", folder, ROOT)
    else:
        succeed(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")  # else the mails of another application would be in it
def mailbox() -> Iterator[Mailbox]:
    mailbox = Mailbox()
    mailbox.start()
    yield mailbox
    mailbox.stop()


@pytest.fixture(scope="module")
def application(wheel, tmp_path_factory, request) -> Application:
    """The module's example, installed into an environment of its own."""
    example = request.module.EXAMPLE
    application = install(example, wheel, tmp_path_factory.mktemp(example.folder))
    request.node.stash[INSTALLED] = application
    return application


@pytest.fixture(scope="module")
def url(create_database, drop_database) -> Iterator[sa.URL]:
    url = create_database()
    yield url
    drop_database(url)


@pytest.fixture(scope="module")
def variables(application, url, mailbox) -> dict[str, object]:
    """What its processes are told, on a database that is up to date."""
    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
    variables = {"DATABASE_URL": plain, "SMTP_HOST": mailbox.host, "SMTP_PORT": mailbox.port}
    application.run(application.example.migrate, **variables)
    return variables


@pytest.fixture(scope="module")
def start_worker(application, variables) -> Iterator[Callable[[], Process]]:
    with ExitStack() as stack:

        def start() -> Process:
            worker = application.start(application.example.worker, **variables)
            stack.callback(worker.end)
            return worker

        yield start


@pytest.fixture(scope="module")
def worker(start_worker) -> Process:
    return start_worker()


@pytest.fixture(scope="module")
def site(application, variables, worker) -> Iterator[Site]:
    with ExitStack() as stack:
        port = free_port()
        command = [part.format(port=port) for part in application.example.web]
        web = application.start(command, **variables, PORT=port)
        stack.callback(web.end)
        site = Site(port, stack)
        until(site.responds, what="the site responds", alive=web)
        yield site


@pytest.fixture(scope="module")
def count_tasks(url) -> Iterator[Callable[[], int]]:
    engine = sa.create_engine(url)

    def count() -> int:
        with engine.connect() as connection:
            return connection.exec_driver_sql("SELECT count(*) FROM apoq_tasks").scalar_one()

    yield count
    engine.dispose()


@pytest.fixture(scope="module")
def calls(application) -> Calls:
    """The calls of the import example's tasks."""
    return Calls(application)


@pytest.fixture(scope="module")
def importing(calls, site, url, mailbox) -> Iterator[Importing]:
    """The import example, ready for uploads."""
    engine = sa.create_engine(url)
    yield Importing(ImportSite(site), engine, mailbox, calls)
    engine.dispose()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    application = item.getparent(pytest.Module).stash.get(INSTALLED, None)
    if report.failed and application:
        for process in application.processes:
            report.sections.append((f"output of {process.name}", process.output()[-20_000:]))
    return report
