"""The import example in the environment of the tests, with a small file."""

from __future__ import annotations

from dataclasses import replace

import pytest
from applications.harness import Application, Process, installed_here
from applications.imports import (
    EXAMPLE,
    LARGEST,
    Imported,
    Importing,
    ImportScenario,
    count_of,
    make_broken_orders,
    make_orders,
)

ROWS = 300


@pytest.fixture(scope="module")
def application(tmp_path_factory) -> Application:
    example = replace(EXAMPLE, web=["gunicorn", "--bind", "127.0.0.1:{port}", "app:create_app()"])
    return installed_here(example, tmp_path_factory.mktemp("import"))


@pytest.fixture(scope="module")
def imported(importing: Importing, worker: Process) -> Imported:
    with importing.held_customer(LARGEST):
        imported = importing.upload(make_orders(ROWS), worker)
        importing.until_rows(imported, ROWS - count_of(imported.content, LARGEST))
    importing.until_ended(imported)
    return imported


@pytest.fixture(scope="module")
def broken(importing: Importing, imported: Imported) -> Imported:
    broken = importing.upload(make_broken_orders(ROWS), imported.worker)
    importing.until_ended(broken)
    return broken


class TestTheImport(ImportScenario):
    """The facts about an import of some hundred rows."""
