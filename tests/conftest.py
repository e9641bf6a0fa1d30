"""A real PostgreSQL for every test: DATABASE_URL, else a container, else a private server."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import as_roles
import pages
import probe
import pytest
import sqlalchemy as sa
from clones import Clones
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from apoq import Queue, Worker, database_url, prepare
from apoq.embedded import PostgreSQL
from apoq.errors import name_commands

FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
"""What the tests ask of a server of their own: nothing in it is to outlive them."""


CORES = os.cpu_count() or 1


AS_ROLES = os.environ.get("APOQ_TEST_AS_ROLES") == "1"
"""Whether apoq's statements run as roles with the grants of `apoq grants`: see `as_roles`."""

MEMORY = Path("/dev/shm")
ROOM = 4_000_000_000
"""Bytes that must be free there for the servers of the tests."""


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Set up the environment of the tests, and of the processes that they start.

    The servers are in memory, where there is room, because cloning a database is faster there. Interpreters
    share their bytecode even if none may be written: there are hundreds, and each would compile apoq, and all
    that lacks bytecode, such as SQLAlchemy if uv has installed it.
    """
    # A shell lets a program in the background ignore these, and so would all processes that tests start.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
    if config.getoption("--hypothesis-profile", None):
        import drawn  # noqa: F401 - it registers one
    if "TMPDIR" not in os.environ and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
        os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
        folder = os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp(prefix="apoq-bytecode-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need the rights of the owner, if apoq runs as roles."""
    for item in items:
        if AS_ROLES and (marker := item.get_closest_marker("as_owner")):
            item.add_marker(pytest.mark.skip(reason=f"as the owner only: {marker.args[0]}"))


def pytest_collection_finish() -> None:
    """Leave the tests themselves to no collection of garbage: some tests collect it many times."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the number of processes for `-n auto`: twice the number of cores, because many tests wait."""
    return CORES * 2


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Let a process that has no tests left take some of another's, unless `--dist` says otherwise."""
    if config.getoption("numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Any:
    """Let a report be sent to xdist's controller if a log or an error in it holds what UTF-8 can't."""
    return encodable((yield))


def encodable(value: Any) -> Any:
    match value:
        case str():
            return value.encode(errors="backslashreplace").decode()
        case dict():
            return {key: encodable(item) for key, item in value.items()}
        case list() | tuple():
            return type(value)(map(encodable, value))
    return value


def docker_answers() -> bool:
    if os.environ.get("APOQ_TEST_DOCKER", "1") != "1" or not find_spec("testcontainers"):
        return False
    host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if not host.startswith("unix://"):
        return True
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(host.removeprefix("unix://")) == 0


@pytest.fixture(autouse=True)
def _own_process_state() -> Iterator[None]:
    """Undo what a test sets for the whole process."""
    probe.forget_shared_tasks()  # the queues of other tests have the same name
    name_commands()
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)  # a command that runs in this process sets up logging
    root.handlers[:] = handlers


@pytest.fixture(scope="session")
def server() -> Iterator[sa.URL]:
    """A server on which databases can be created."""
    if url := os.environ.get("DATABASE_URL"):
        yield database_url(url)
    elif docker_answers():
        from testcontainers.community.postgres import PostgresContainer

        image = os.environ.get("APOQ_TEST_IMAGE", "postgres:18-alpine")
        with PostgresContainer(image, driver="psycopg") as container:
            yield database_url(container.get_connection_url())
    else:
        with PostgreSQL(settings=FAST) as postgresql:
            yield database_url(postgresql.url)


@pytest.fixture(scope="session")
def admin(server: sa.URL) -> Iterator[sa.Engine]:
    # Two connections that stay open, because a new one would take half the time of cloning a database.
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT", pool_size=2, pool_pre_ping=True)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def _roles(admin: sa.Engine) -> Iterator[None]:
    """The roles of apoq's statements, if they don't run as the owner."""
    with as_roles.running_as_roles(admin) if AS_ROLES else nullcontext():
        yield


@pytest.fixture(scope="session")
def create_database(admin: sa.Engine, server: sa.URL, _roles: None) -> Callable[..., sa.URL]:
    with admin.connect() as connection:
        # It takes a third of the time, unless the server has to wait for its disk.
        is_fast = connection.exec_driver_sql("SHOW fsync").scalar_one() == "off"
    strategy = "FILE_COPY" if is_fast else "WAL_LOG"

    def create(template: str = "template0") -> sa.URL:
        name = f"apoq_test_{uuid.uuid4().hex[:10]}"
        with admin.connect() as connection:
            connection.exec_driver_sql(
                f"CREATE DATABASE {name} TEMPLATE {template} ENCODING 'UTF8' STRATEGY {strategy}"
            )
        return server.set(database=name)

    return create


@pytest.fixture(scope="session")
def drop_database(admin: sa.Engine) -> Callable[[sa.URL], None]:
    def drop(url: sa.URL) -> None:
        with admin.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {url.database} WITH (FORCE)")

    return drop


@pytest.fixture(scope="session")
def template(create_database, drop_database) -> Iterator[sa.URL]:
    """A database with apoq's tables, to be cloned."""
    url = create_database()
    engine = sa.create_engine(url, poolclass=NullPool)
    prepare(engine)
    with engine.begin() as connection:
        # What processors of the tests write through task.session.
        connection.exec_driver_sql("CREATE TABLE ledger (task_id bigint NOT NULL)")
    engine.dispose()
    yield url
    drop_database(url)


@pytest.fixture
def empty_url(create_database, drop_database) -> Iterator[sa.URL]:
    """A new database with nothing in it."""
    url = create_database()
    yield url
    drop_database(url)


@pytest.fixture(scope="session")
def clones(template, create_database, drop_database) -> Iterator[Clones]:
    """Databases with apoq's tables."""
    clones = Clones(lambda: create_database(template.database), drop_database)
    yield clones
    clones.close()


@pytest.fixture
def url(clones) -> Iterator[sa.URL]:
    """A database of the test's own, with apoq's tables."""
    url = clones.take()
    yield url
    clones.give_back(url)


@pytest.fixture
def engine(url) -> Iterator[sa.Engine]:
    engine = sa.create_engine(url)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def shared_engine(template, create_database, drop_database) -> Iterator[sa.Engine]:
    """A database that tests share by rolling back what they do."""
    url = create_database(template.database)
    engine = sa.create_engine(url)
    yield engine
    engine.dispose()
    drop_database(url)


@pytest.fixture
def session(shared_engine) -> Iterator[Session]:
    """A session in a transaction that is rolled back."""
    with Session(shared_engine) as session:
        yield session
        session.rollback()


@pytest.fixture
def run_page(monkeypatch) -> Callable[..., dict[str, Any]]:
    """Run the code of a page of `docs/` as a module that has what is given; answer the module's namespace."""

    def run(page: str, module_name: str = "page", **given: Any) -> dict[str, Any]:
        module = ModuleType(module_name)
        vars(module).update(given)
        # Where dataclasses and the like look for it.
        monkeypatch.setitem(sys.modules, module_name, module)
        pages.run(pages.DOCS / page, module)
        return vars(module)

    return run


@pytest.fixture
def queue() -> Queue:
    return Queue()


@pytest.fixture
def make_worker(engine) -> Iterator[Callable[..., Worker]]:
    """Make workers that are stopped when the test ends."""
    made: list[Worker] = []

    def make(*queues: Queue, **options) -> Worker:
        worker = Worker(engine, *queues, **options)
        made.append(worker)
        return worker

    yield make
    for worker in made:
        worker.stop(timeout=5)


@pytest.fixture
def worker(make_worker) -> Worker:
    return make_worker()


@pytest.fixture
def site(engine: sa.Engine) -> Iterator[Any]:
    """The dashboard's site of this test's database."""
    from apoq.dashboard.site import Site  # here, because few tests need what it imports

    site = Site(engine, schema=None, redact=None, environment="test", secret="of the tests")
    yield site
    site.close()


@pytest.fixture
def writer(site) -> Any:
    """A viewer of the dashboard who may change something."""
    from viewers import Dashboard, Viewer

    return Viewer(Dashboard(site), "write")


@pytest.fixture
def reader(site) -> Any:
    """A viewer of the dashboard who may only read."""
    from viewers import Dashboard, Viewer

    return Viewer(Dashboard(site), "read")
