"""``apoq dashboard``."""

from __future__ import annotations

import errno
import socket
from importlib import import_module
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

import click

from apoq.cli.exits import BadUsage, Failure
from apoq.cli.target import Target

_REFUSED: Final = (
    "on --host {host}, everyone who can reach this machine could see the dashboard: give a password by "
    "--user NAME --password-file FILE, or, if a proxy in front of it asks for one, --behind-proxy"
)


@click.command("dashboard")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65_535), default=8080, show_default=True, help="The port; 0: any."
)
@click.option("--write", "writes", is_flag=True, help="Also retry, cancel, pause and so on, not only read.")
@click.option("--user", metavar="NAME", help="Ask for this user, and for the password of --password-file.")
@click.option(
    "--password-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The file whose first line is the password.",
)
@click.option(
    "--behind-proxy", is_flag=True, help="Allow everyone: a proxy in front of it decides who may see it."
)
@click.option("--environment", metavar="NAME", help="A name for each page; `production` is red.")
@click.pass_obj
def command(
    target: Target,
    /,
    *,
    host: str,
    port: int,
    writes: bool,
    user: str | None,
    password_file: Path | None,
    behind_proxy: bool,
    environment: str | None,
) -> None:
    """See and steer the queue in a browser.

    By default, only browsers on this machine may see it, and nothing can be changed.

    \b
        apoq dashboard
        apoq dashboard --write --environment staging
        apoq dashboard --host 0.0.0.0 --user ops --password-file /run/secrets/apoq

    A password is only safe with TLS: put a proxy in front of it that has a certificate.
    """  # noqa: D301 - click's sign
    if (user is None) != (password_file is None):
        raise BadUsage("--user and --password-file must be given together")
    if user is not None and ":" in user:
        raise BadUsage(f"--user must not contain a colon, got {user!r}")
    if not _is_loopback(host) and user is None and not behind_proxy:
        raise BadUsage(_REFUSED.format(host=host))
    serving = _serving()
    password = None if password_file is None else _password(serving, password_file)
    app = serving.make_app(
        target.engine,
        target.schema,
        writes=writes,
        environment=environment,
        user=user,
        password=password,
        is_behind_proxy=behind_proxy,
    )
    with _listen(host, port) as listener:
        shown = f"[{host}]" if ":" in host else host
        mode = "" if writes else " (read only)"
        click.echo(f"Dashboard on http://{shown}:{listener.getsockname()[1]}/{mode}. Ctrl-C stops it.")
        serving.serve(app, listener, is_behind_proxy=behind_proxy)


def _serving() -> Any:
    """Import the server, which needs the extra."""
    for name in ("jinja2", "starlette", "uvicorn"):
        if find_spec(name) is None:
            raise Failure(f'{name} is not installed: pip install "apoq[dashboard]"')
    return import_module("apoq.dashboard.serving")


def _password(serving: Any, path: Path) -> str:
    try:
        password: str = serving.read_password(path)
    except (OSError, UnicodeDecodeError) as error:
        raise BadUsage(f"the password file {path} can't be read: {error}") from None
    if not password:
        raise BadUsage(f"the first line of the password file {path} must be the password, but it is empty")
    return password


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Failure(f"port {port} is in use on {host}: choose another one by --port") from None
        if error.errno in {errno.EACCES, errno.EPERM}:
            raise Failure(f"port {port} may not be used by this user: choose one from 1024 on") from None
        raise Failure(f"can't listen on {host}, port {port}: {error.strerror or error}") from None


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
