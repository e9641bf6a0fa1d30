"""What processes serve over HTTP, and the commands that ask for it."""

from __future__ import annotations

import http.client
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from click.testing import CliRunner
from waiting import patience
from worker_programs import Program, free_ports

from apoq import Worker
from apoq.cli import http_server, main
from apoq.cli.exits import Failure
from apoq.cli.http_server import Response, Server
from apoq.cli.serving import Serving
from apoq.errors import MissingExtra
from apoq.events import ThreadDied

APP = """
import time
from apoq import Queue

queue = Queue()

@queue.task
def nap(): time.sleep(0.01)
"""

until = patience(20)


def get(url: str) -> tuple[int, str]:
    try:
        with urlopen(url, timeout=10) as response:
            return response.status, response.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.fixture
def run(url, monkeypatch) -> Callable[..., tuple[int, str]]:
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))

    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, arguments)
        return done.exit_code, done.output

    return run


@pytest.fixture
def start(url, tmp_path) -> Iterator[Callable[..., Program]]:
    (tmp_path / "app.py").write_text(APP)
    started = []

    def begin(*arguments: str) -> Program:
        started.append(Program("app:queue", *arguments, cwd=tmp_path, url=url))
        return started[-1]

    yield begin
    for program in started:
        program.kill()


@pytest.fixture
def host() -> Iterator[Callable[..., Server]]:
    made = []

    def begin(port: int = 0, **pages: Callable[[str], Response]) -> Server:
        its = {f"/{name}": page for name, page in pages.items()}
        made.append(Server("127.0.0.1", port, its, option="--metrics-port"))
        made[-1].start()
        return made[-1]

    yield begin
    for each in made:
        each.close()


class TestTheServer:
    def test_it_serves_its_pages_and_names_them(self, host):
        its = host(hello=lambda accept: Response(200, b"hello"))

        assert get(f"{its.url}/hello?x=1") == (200, "hello")
        assert get(f"{its.url}/") == (404, "there is no such page: choose one of /hello\n")

    def test_a_page_that_fails_harms_no_other(self, host, caplog):
        its = host(fails=lambda accept: 1 / 0, hello=lambda accept: Response(200, b"hello"))

        assert get(f"{its.url}/fails")[0] == 500
        assert "division by zero" in caplog.text
        assert get(f"{its.url}/hello") == (200, "hello")

    def test_it_responds_to_head_without_a_body(self, host):
        its = host(hello=lambda accept: Response(200, b"hello"))
        with closing(http.client.HTTPConnection(its.url.removeprefix("http://"))) as connection:
            connection.request("HEAD", "/hello")
            response = connection.getresponse()

            assert (response.status, response.headers["Content-Length"], response.read()) == (200, "5", b"")

    def test_silent_clients_hold_it_up_for_a_bounded_time(self, host, monkeypatch):
        monkeypatch.setattr(http_server._Handler, "timeout", 0.2)
        its = host(hello=lambda accept: Response(200, b"hello"))
        address = ("127.0.0.1", int(its.url.rpartition(":")[2]))
        silent = [socket.create_connection(address) for _ in range(3 * http_server.THREADS)]

        found = get(f"{its.url}/hello")

        for client in silent:
            client.close()
        assert found == (200, "hello")
        assert sum(thread in its.threads for thread in threading.enumerate()) == http_server.THREADS
        its.close()
        until(lambda: not any(thread.is_alive() for thread in its.threads))

    def test_a_port_in_use_is_a_clear_error(self, host):
        port = int(host().url.rpartition(":")[2])

        with pytest.raises(Failure, match=rf"port {port} on 127.0.0.1 is in use: .* another --metrics-port"):
            host(port)

    def test_an_address_must_be_one_of_this_machine(self):
        with pytest.raises(Failure, match="correct --metrics-port or --bind"):
            Server("203.0.113.1", 0, {}, option="--metrics-port")


class TestHealth:
    @pytest.fixture
    def ask(self, make_worker) -> Iterator[tuple[Worker, Callable[[str], int]]]:
        worker = make_worker(concurrency=1)
        worker.use("t", lambda task: None)
        serving = Serving()
        serving.begin(worker, metrics_port=None, health_port=0, bind="127.0.0.1")
        (server,) = serving.servers
        yield worker, lambda path: get(f"{server.url}{path}")[0]
        serving.close()

    def test_a_worker_is_ready_while_it_works(self, ask):
        worker, status = ask
        assert (status("/live"), status("/ready")) == (200, 503)

        worker.start()

        until(lambda: status("/ready") == 200)
        worker.stop()
        assert (status("/live"), status("/ready")) == (200, 503)

    def test_it_is_alive_until_a_thread_dies(self, ask):
        worker, status = ask

        worker.events.report(ThreadDied("apoq-claimer", MemoryError()))

        assert (status("/live"), worker.is_alive()) == (503, False)

    def test_the_command_asks_the_process(self, make_worker, run):
        worker = make_worker()
        serving = Serving()
        serving.begin(worker, metrics_port=None, health_port=0, bind="127.0.0.1")
        (server,) = serving.servers
        port = server.url.rpartition(":")[2]

        code, said = run("health", "--port", port)
        assert (code, "Error: not ready: the worker has not started" in said) == (1, True)
        assert run("health", "--port", port, "--live") == (0, "alive\n")
        serving.close()

        code, said = run("health", "--port", port)
        assert (code, f"start the worker with --health-port {port}" in said) == (3, True)

    def test_the_command_finds_a_worker_of_this_machine_in_the_database(self, make_worker, run):
        code, said = run("health")
        assert (code, "no worker of this machine" in said) == (1, True)
        worker = make_worker()
        worker.start()
        until(worker.is_healthy)

        assert run("health") == (0, "1 worker is alive\n")

        assert run("health", "--live")[0] == 2


class TestMetrics:
    def test_once_prints_those_of_the_database(self, run):
        code, said = run("metrics", "--once")

        assert code == 0
        assert "\napoq_database_up 1.0\n" in said

    def test_a_missing_library_is_named_with_its_extra(self, run, make_worker, monkeypatch):
        for name in [name for name in sys.modules if name.startswith(("apoq.metrics", "prometheus_client"))]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "prometheus_client", None)

        expected = 'the package prometheus-client is not installed: pip install "apoq[metrics]"'
        assert run("metrics", "--once") == (1, f"Error: {expected}\n")
        with pytest.raises(MissingExtra, match="prometheus-client is not installed"):
            make_worker(metrics=True)

    @pytest.mark.slow
    def test_a_worker_process_serves_them_with_its_health(self, start):
        program = start("--metrics-port", "0", "--health-port", "0")
        url = re.search(r"http://\S+", program.wait_for("/metrics and /live and /ready at http")).group()

        until(lambda: get(f"{url}/ready")[0] == 200)
        status, text = get(f"{url}/metrics")

        assert (status, "apoq_slots 4.0" in text) == (200, True)
        assert program.stop() == 0

    @pytest.mark.slow
    def test_several_processes_have_one_port_each(self, start):
        first = free_ports(2)
        program = start("--processes", "2", "--metrics-port", str(first))

        for port in (first, first + 1):
            until(lambda port=port: responds(f"http://127.0.0.1:{port}/metrics"))
        assert program.stop() == 0

    @pytest.mark.parametrize(("metrics", "health"), [(9400, 9402), (9402, 9400)])
    def test_the_ports_of_several_processes_must_not_overlap(self, run, metrics, health):
        ports = ["--metrics-port", str(metrics), "--health-port", str(health)]

        code, said = run("worker", "app:queue", "--processes", "3", *ports)

        assert code == 2
        assert "must be the same port, or at least 3 apart, because each of the 3 processes" in said

    @pytest.mark.slow
    def test_a_worker_whose_port_is_in_use_does_not_start(self, start):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            program = start("--health-port", str(taken.getsockname()[1]))

            program.wait_for("is in use")
            assert program.end() == 1


def responds(url: str) -> bool:
    try:
        return get(url)[0] == 200
    except OSError:
        return False
