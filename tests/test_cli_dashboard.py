"""``apoq dashboard``."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result

from apoq.cli import dashboard, main


@pytest.fixture
def run(engine) -> Callable[..., Result]:
    url = engine.url.render_as_string(hide_password=False)
    return lambda *arguments: CliRunner(env={"APOQ_DATABASE_URL": url}).invoke(
        main, ["dashboard", *map(str, arguments)]
    )


@pytest.fixture
def password(tmp_path) -> Path:
    path = tmp_path / "password"
    path.write_text("ö:s3cret\nnot this\n", "utf-8")
    return path


@pytest.fixture
def serve(engine) -> Iterator[Callable[..., str]]:
    """Start the program; return its address."""
    programs: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> str:
        environment = {**os.environ, "APOQ_DATABASE_URL": engine.url.render_as_string(hide_password=False)}
        program = subprocess.Popen(
            [sys.executable, "-m", "apoq", "dashboard", "--port", "0", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        programs.append(program)
        assert program.stdout is not None
        said = program.stdout.readline()
        found = re.search(r"http://\S+", said)
        assert found is not None, said
        return found[0]

    yield start
    for program in programs:
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=30)
        assert errors == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "queue.example"])
def test_an_open_address_without_authentication_is_refused_with_two_ways_out(run, host):
    result = run("--host", host)

    assert result.exit_code == 2
    assert "--user NAME --password-file FILE" in result.output
    assert "--behind-proxy" in result.output


@pytest.mark.parametrize("given", [["--user", "ops"], ["--password-file", __file__]])
def test_a_user_and_a_password_belong_together(run, given):
    assert "must be given together" in run(*given).output


def test_a_user_with_a_colon_is_refused(run, password):
    assert "must not contain a colon" in run("--user", "a:b", "--password-file", password).output


def test_an_empty_password_is_refused(run, tmp_path):
    (tmp_path / "empty").write_text("\nsecret\n")

    result = run("--user", "ops", "--password-file", tmp_path / "empty")

    assert result.exit_code == 2
    assert "the first line of the password file" in result.output


def test_a_password_file_that_cannot_be_read_is_refused(run, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")

    assert "can't be read" in run("--user", "ops", "--password-file", tmp_path / "binary").output


def test_a_port_in_use_is_an_error_that_says_so(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("--port", port)

    assert result.exit_code == 1
    assert f"port {port} is in use on 127.0.0.1: choose another one by --port" in result.output


def test_an_address_of_another_machine_is_an_error_that_says_so(run):
    assert "can't listen on 192.0.2.1" in run("--host", "192.0.2.1", "--behind-proxy").output


@pytest.mark.parametrize("name", ["jinja2", "starlette", "uvicorn"])
def test_a_missing_extra_is_named(run, name, monkeypatch):
    monkeypatch.setattr(dashboard, "find_spec", lambda asked: None if asked == name else find_spec(asked))

    result = run()

    assert result.exit_code == 1
    assert f'{name} is not installed: pip install "apoq[dashboard]"' in result.output


@pytest.mark.slow
def test_without_the_extra_the_import_says_what_to_install():
    code = "import sys; sys.modules['jinja2'] = None; import apoq.dashboard"

    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert 'pip install "apoq[dashboard]"' in said.stderr


@pytest.mark.slow
def test_by_default_it_reads_and_only_from_this_machine(serve):
    address = serve()

    assert "read only" in httpx.get(address).text
    assert httpx.get(address, headers={"Host": "evil.example"}).status_code == 403
    assert httpx.get(address, headers={"X-Forwarded-For": "127.0.0.1"}).status_code == 403
    assert httpx.get(address).headers.get("server") is None


@pytest.mark.slow
def test_it_asks_for_the_user_and_the_password(serve, password):
    address = serve("--user", "ops", "--password-file", password, "--write")

    statuses = [
        httpx.get(address, auth=auth).status_code
        for auth in (
            ("ops", "ö:s3cret"),
            ("ops", "ö"),
            ("ops", ""),
            ("root", "ö:s3cret"),
        )
    ]
    refused = httpx.get(f"{address}static/style.css")

    assert statuses == [200, 401, 401, 401]
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"].startswith("Basic")
    assert refused.headers["x-frame-options"] == "DENY"
    assert httpx.get(address, headers={"Authorization": "Basic ???"}).status_code == 401
    assert "read only" not in httpx.get(address, auth=("ops", "ö:s3cret")).text


@pytest.mark.slow
def test_behind_a_proxy_it_believes_the_proxy(serve):
    address = serve("--behind-proxy", "--write", "--environment", "production")

    response = httpx.get(address, headers={"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https"})

    assert response.status_code == 200
    assert "; Secure" in response.headers["set-cookie"]
    assert 'class="tag production"' in response.text
