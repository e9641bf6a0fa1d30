"""The command line on any kind of terminal, pipe or file, and where there is none."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from apoq import Queue
from apoq.cli.commands import COMMANDS

pytestmark = pytest.mark.slow

APOQ = [sys.executable, "-m", "apoq"]


@pytest.fixture(scope="module")
def module_url(template, create_database, drop_database) -> Iterator[sa.URL]:
    url = create_database(template.database)
    with sa.create_engine(url, poolclass=NullPool).begin() as connection:
        Queue().add(connection, "é€💖", {"color": "💖"})
    yield url
    drop_database(url)


@pytest.fixture
def environment(module_url, monkeypatch) -> dict[str, str]:
    for name in ("COLUMNS", "NO_COLOR", "PYTHONIOENCODING"):
        monkeypatch.delenv(name, raising=False)
    return {**os.environ, "APOQ_DATABASE_URL": module_url.render_as_string(hide_password=False)}


@pytest.fixture
def shell(environment) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Run a line in which `apoq` stands for the program."""

    def call(line: str, **more: str) -> subprocess.CompletedProcess[bytes]:
        script = f'apoq() {{ "{sys.executable}" -m apoq "$@"; }}; set -o pipefail; {line}'
        done = subprocess.run(
            ["bash", "-c", script], env=environment | more, capture_output=True, check=False, timeout=60
        )
        assert b"Traceback" not in done.stdout + done.stderr
        assert b"Exception ignored" not in done.stderr
        return done

    return call


NARROW = {
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("narrow", NARROW.values(), ids=NARROW)
class TestAnEncodingThatLacksCharacters:
    def test_it_gets_signs_of_its_own(self, shell, narrow):
        assert shell("apoq doctor", **narrow).stdout.startswith(b"+ server")

    def test_arguments_and_data_are_utf8_and_a_program_gets_the_same_json(self, shell, narrow):
        done = shell("echo '\"€💖\"' | apoq add é€💖 - && apoq list --type é€💖 --limit 1 --json", **narrow)

        found = json.loads(done.stdout.splitlines()[1])
        assert (found["type"], found["data"]) == ("é€💖", "€💖")


@pytest.mark.parametrize("command", ["--help", "list --json", "stats"])
class TestStdout:
    def test_nobody_reads_it(self, shell, command):
        done = shell(f"apoq {command} | true")

        assert done.returncode in {0, 1}  # 0 if it was written before the other end was closed
        assert done.stderr == b""

    def test_it_is_closed(self, shell, command):
        done = shell(f"apoq {command} >&-")

        assert (done.returncode, done.stderr) == (0, b"")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
    def test_it_is_full(self, shell, command):
        done = shell(f"apoq {command} > /dev/full")

        assert (done.returncode, done.stderr) == (1, b"Error: [Errno 28] No space left on device\n")


class TestTheOtherStreams:
    def test_stderr_is_closed(self, shell):
        done = shell("apoq show 999 2>&-")

        assert (done.returncode, done.stdout) == (1, b"")

    def test_stdin_is_closed_and_data_are_to_come_from_it(self, shell):
        done = shell("apoq add t - <&-")

        assert (done.returncode, b"stdin is closed" in done.stderr) == (2, True)

    def test_stdin_is_closed_and_somebody_is_to_be_asked(self, shell):
        done = shell("apoq add t && apoq add t && apoq cancel --type t <&-")

        assert (done.returncode, b"pass --yes" in done.stderr) == (2, True)

    def test_stdin_may_begin_with_a_byte_order_mark(self, shell):
        assert shell("printf '\\xef\\xbb\\xbf{}' | apoq add t -").returncode == 0


def on_terminal(environment: dict[str, str], *arguments: str, columns: int = 80) -> str:
    """Answer what the program writes on a terminal so many columns wide."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with subprocess.Popen(
        [*APOQ, *arguments], env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        written = b""
        try:
            while read := os.read(ours, 65536):
                written += read
        except OSError:
            pass  # the end of a terminal, on Linux
        finally:
            os.close(ours)
    assert process.returncode in {0, 1}
    assert b"Traceback" not in written
    return written.decode()


@pytest.mark.parametrize("arguments", [["list"], ["stats"], ["show", "999"]])
def test_a_terminal_of_few_columns_is_taken_for_one_of_twenty(environment, arguments):
    written = on_terminal(environment | {"TERM": "dumb"}, *arguments, columns=1)

    assert max(map(len, written.splitlines())) > 10
    assert "\x1b" not in written  # nothing that moves the cursor of a dumb one


def test_a_program_reads_what_stats_watches(environment):
    with subprocess.Popen(
        [*APOQ, "stats", "--watch", "--every", "0.1s"], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        titles = (line for line in process.stdout if line.startswith("queue"))
        assert len([*islice(titles, 2)]) == 2
        process.terminate()


class TestWithoutLibpq:
    """psycopg can't be imported then; here because it is to use its C implementation, which isn't there."""

    @pytest.fixture
    def call(self, shell) -> Callable[..., subprocess.CompletedProcess[bytes]]:
        return lambda line: shell(line, PSYCOPG_IMPL="c")

    def test_version_and_help_are_there(self, call):
        assert b"0.1.0" in call("apoq --version").stdout
        assert all(name.encode() in call("apoq --help").stdout for name in COMMANDS)

    @pytest.mark.parametrize("command", ["stats --json", "worker app:queue --processes 2"])
    def test_a_command_says_in_a_line_what_to_install(self, call, command):
        done = call(f"apoq --schema jobs {command}")

        assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
        assert b'pip install "apoq[binary]"' in done.stderr

    def test_a_program_is_told_so_when_it_imports_something(self):
        program = "try: from apoq import Queue\nexcept ImportError as error: print(error)"

        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PSYCOPG_IMPL": "c"},
            capture_output=True,
            check=True,
        )

        assert b'pip install "apoq[binary]"' in done.stdout
