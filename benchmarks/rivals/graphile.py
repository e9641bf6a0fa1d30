"""Graphile Worker 0.17, which runs on Node.js; tasks are added by its SQL functions.

It has the batching options of its performance guide. To take part, it must be installed by `npm install
graphile-worker@0.17`, and NODE_PATH must name the folder `node_modules`. It deletes each finished row.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import psycopg
from psycopg.types.json import Json

from benchmarks.contender import TYPE, Contender, document

PROGRAM = Path(__file__).with_name("graphile.cjs")

ADD = f"SELECT FROM graphile_worker.add_job('{TYPE}', %s)"
ADD_MANY = f"""
    SELECT count(*) FROM graphile_worker.add_jobs(ARRAY (
        SELECT ROW('{TYPE}', payload, NULL, NULL, NULL, NULL, NULL, NULL)::graphile_worker.job_spec
        FROM {{payloads}}))
"""


class GraphileWorker(Contender):
    name = "Graphile Worker"
    needs = ("psycopg",)
    worker_program = ("node", str(PROGRAM))
    table = "graphile_worker._private_jobs"
    unfinished = "SELECT EXISTS (SELECT FROM graphile_worker._private_jobs)"
    finished = """
        SELECT coalesce(pg_sequence_last_value(
                pg_get_serial_sequence('graphile_worker._private_jobs', 'id')::regclass), 0) - count(*)
        FROM graphile_worker._private_jobs
    """
    fills: ClassVar = {
        "due": ADD_MANY.format(
            payloads="""
                generate_series(%(first)s, %(first)s + %(count)s - 1) n,
                json_build_object('n', n, 'padding', repeat('x', 80)) payload
            """
        ),
    }

    @classmethod
    def missing(cls) -> list[str]:
        node = shutil.which("node")
        if not node:
            return [*super().missing(), "node"]
        found = subprocess.run([node, "-e", "require('graphile-worker')"], capture_output=True, check=False)
        return super().missing() + (["graphile-worker"] if found.returncode else [])

    def prepare(self) -> None:
        subprocess.run([*self.worker_program, self.url, "--prepare"], check=True)

    async def connect(self) -> None:
        self.connection = psycopg.connect(self.url, autocommit=True)

    async def add(self, number: int) -> None:
        self.connection.execute(ADD, (Json(document(number)),), prepare=True)

    async def add_many(self, numbers: Iterable[int]) -> None:
        payloads = json.dumps([document(number) for number in numbers])
        self.connection.execute(
            ADD_MANY.format(payloads="json_array_elements(%s) payload"), (payloads,), prepare=True
        )

    async def close(self) -> None:
        self.connection.close()
