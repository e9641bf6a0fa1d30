"""What the tests of the example applications share: an installed one, its processes, and a mailbox."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from email import message_from_bytes
from pathlib import Path
from typing import Any

import httpx
from aiosmtpd.controller import Controller

ROOT = Path(__file__).parent.parent.parent

UV = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
"""It makes environments in no time; pip does the same where it isn't installed."""

SOON = 30.0
"""Seconds within which anything happens, on a machine that has other things to do."""


def until(condition: Callable[[], Any], *, what: str, alive: Process | None = None) -> Any:
    """Wait for something that happens elsewhere, while the process that is to do it lives; answer it."""
    deadline = time.monotonic() + SOON
    while not (answer := condition()):
        assert alive is None or alive.is_alive(), f"{alive.name} has ended before {what}"
        assert time.monotonic() < deadline, f"{what}: not within {SOON:.0f} s"
        time.sleep(0.02)
    return answer


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


class Mailbox:
    """An SMTP server that notes the mails it has accepted, and can be told to accept none for a while."""

    def __init__(self) -> None:
        self.host, self.port = "127.0.0.1", free_port()
        self.mails: list[tuple[str, str]] = []
        """The recipient of each, and its text."""
        self._stalls = False
        self._holds = threading.Event()
        self._controller = Controller(self, hostname=self.host, port=self.port)

    def start(self) -> None:
        self._controller.start()

    def stop(self) -> None:
        self._controller.stop()

    def of(self, recipient: str) -> list[str]:
        return [text for to, text in self.mails if to == recipient]

    @contextmanager
    def stalled(self) -> Iterator[threading.Event]:
        """Hold whoever sends a mail, and don't accept it until they give up; the event tells of the first."""
        self._holds.clear()
        self._stalls = True
        try:
            yield self._holds
        finally:
            self._stalls = False

    async def handle_DATA(self, _server: object, _session: object, envelope: Any) -> str:  # noqa: N802
        if self._stalls:
            self._holds.set()
            await asyncio.Event().wait()  # cancelled with the connection
        text = str(message_from_bytes(envelope.content))
        self.mails += [(recipient, text) for recipient in envelope.rcpt_tos]
        return "250 Accepted"


class Process:
    """A process of an application, whose output stands in a file."""

    def __init__(
        self, command: Sequence[str | Path], *, cwd: Path, env: Mapping[str, str], log: Path
    ) -> None:
        self.name = " ".join([Path(command[0]).name, *map(str, command[1:])])
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def wait(self) -> int:
        return self._process.wait(SOON)

    def interrupt(self) -> None:
        """What Ctrl-C does: tell the process and its children."""
        os.killpg(self._process.pid, signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL it, and the children that it has started."""
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def end(self) -> None:
        """Ask it to end, and don't ask again."""
        if self.is_alive():
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        self.kill()


@dataclass(frozen=True)
class Example:
    """A folder of `examples/`, and the commands that its README names; ``{port}`` is the web server's."""

    folder: str
    extras: str
    """Of apoq's, as ``binary,embedded,flask``."""
    migrate: Sequence[str]
    web: Sequence[str]
    worker: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Application:
    """An example, installed from the wheel into an environment of its own."""

    example: Example
    folder: Path
    """A copy, apart from this project."""
    programs: Path
    """The folder of the environment's commands."""
    home: Path
    """Where its processes write."""
    processes: list[Process] = field(default_factory=list)

    def environment(self, **variables: object) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("TMPDIR", "APOQ_PG_BINDIR") if name in os.environ}
        return {
            "PATH": f"{self.programs}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self.home),
            "PYTHONUNBUFFERED": "1",
            "PYTHONIOENCODING": "utf-8",
            **kept,
            **self.example.environment,
            **{name: str(value) for name, value in variables.items()},
        }

    def start(self, command: Sequence[str], *, cwd: Path | None = None, **variables: object) -> Process:
        program = self.programs / command[0]
        log = self.home / f"output-{len(self.processes)}.log"
        process = Process(
            [program, *command[1:]], cwd=cwd or self.folder, env=self.environment(**variables), log=log
        )
        self.processes.append(process)
        return process

    def run(self, command: Sequence[str], **variables: object) -> str:
        """Run a command to its end, which is to be a good one; answer its output."""
        process = self.start(command, **variables)
        code = process.wait()
        assert code == 0, f"{process.name} ended with {code}:\n{process.output()}"
        return process.output()


def succeed(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"


def install(example: Example, wheel: Path, folder: Path) -> Application:
    """Install the example's requirements and the wheel into a fresh environment."""
    venv = folder / "venv"
    copy = copied(example, folder)
    succeed(sys.executable, "-m", "venv", "--without-pip", venv)
    python = venv / "bin" / "python"
    wanted = [f"{wheel}[{example.extras}]", "-r", copy / "requirements.txt"]
    if UV:
        succeed(UV, "pip", "install", "--quiet", "--python", python, *wanted)
    else:
        succeed(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *wanted)
    return Application(example, copy, venv / "bin", venv)


def installed_here(example: Example, folder: Path) -> Application:
    """Return the example in the environment of the tests: it starts sooner, and proves less."""
    return Application(example, copied(example, folder), Path(sys.executable).parent, folder)


def copied(example: Example, folder: Path) -> Path:
    copy = folder / "examples" / example.folder
    shutil.copytree(
        ROOT / "examples" / example.folder, copy, ignore=shutil.ignore_patterns("__pycache__", ".*")
    )
    return copy


class Site:
    """A running web server, as a browser sees it."""

    def __init__(self, port: int, stack: ExitStack) -> None:
        self.client = stack.enter_context(
            # No proxy: it is on this machine.
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SOON, trust_env=False)
        )

    def responds(self) -> bool:
        try:
            return self.client.get("/").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def page(self) -> str:
        response = self.client.get("/")
        assert response.status_code == httpx.codes.OK, response.text
        return response.text

    def sign_up(self, email: str, **fields: str) -> int:
        """Fill in the page's form and send it; answer the status."""
        hidden = re.findall(r'<input[^>]*type="hidden"[^>]*name="([^"]+)"[^>]*value="([^"]*)"', self.page())
        data = {**dict(hidden), "name": "Ada", "email": email, **fields}
        return self.client.post("/sign-up", data=data).status_code


class Scenario:
    """What every application is to do; a test class inherits it, in a module with an `EXAMPLE`."""

    def test_a_request_that_commits_leads_to_one_mail(self, site, mailbox, count_tasks, worker):
        assert site.sign_up("ada@example.org") in {200, 303}

        until(lambda: mailbox.of("ada@example.org"), what="a mail", alive=worker)
        until(lambda: "ada@example.org" in site.page(), what="the page shows the mail", alive=worker)
        assert len(mailbox.of("ada@example.org")) == count_tasks() == 1

    def test_a_request_that_raises_leads_to_none(self, site, mailbox, count_tasks, worker):
        before = count_tasks()

        assert site.sign_up("raised@example.org", fail="1") == 500

        assert count_tasks() == before
        # Whatever it had led to would have been sent by the time when this one is.
        site.sign_up("after@example.org")
        until(lambda: mailbox.of("after@example.org"), what="a mail", alive=worker)
        assert mailbox.of("raised@example.org") == []

    def test_a_worker_killed_while_it_sends_leads_to_one_in_the_end(
        self, site, mailbox, worker, start_worker
    ):
        with mailbox.stalled() as holds:
            site.sign_up("killed@example.org")
            until(holds.is_set, what="the worker sends", alive=worker)
            worker.kill()

        another = start_worker()
        until(lambda: mailbox.of("killed@example.org"), what="a mail", alive=another)
        until(lambda: "killed@example.org" in site.page(), what="the page shows the mail", alive=another)
        assert len(mailbox.of("killed@example.org")) == 1

    def test_one_command_starts_everything(self, application):
        port = free_port()  # this alone is said, for another application may be running here
        program = application.start(
            ["python", f"examples/{application.folder.name}"], cwd=application.folder.parent.parent, PORT=port
        )

        with ExitStack() as stack:
            stack.callback(program.end)
            site = Site(port, stack)
            until(site.responds, what="the site responds", alive=program)
            assert site.sign_up("one@example.org") in {200, 303}
            until(lambda: "one@example.org" in program.output(), what="the mail is printed", alive=program)
            until(lambda: "one@example.org" in site.page(), what="the page shows it", alive=program)
            program.interrupt()
            program.wait()

        assert "Traceback" not in program.output()
