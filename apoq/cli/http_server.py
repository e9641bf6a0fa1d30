"""A small HTTP server for metrics and health checks, with a fixed number of threads."""

from __future__ import annotations

import errno
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from apoq.cli.exits import Failure

logger = logging.getLogger(__name__)

THREADS: Final = 4
"""Requests that are served at once; others wait."""

CLIENT_TIMEOUT_SECONDS: Final = 5.0
"""Seconds that a client may be silent."""

TEXT: Final = "text/plain; charset=utf-8"


class PortInUse(Failure):
    """Another process has the port."""


class Response(NamedTuple):
    """The response of a page."""

    status: int
    body: bytes
    content_type: str = TEXT


Page = Callable[[str], Response]
"""Takes the request's header `Accept`."""


class Server:
    """Serves pages on its own threads, from `start` to `close`."""

    def __init__(self, host: str, port: int, pages: Mapping[str, Page], *, option: str) -> None:
        """Bind the port; `Failure` if that can't be done. `option` is the one that chose the port."""
        try:
            self._server = _Server(host, port, pages)
        except (OSError, OverflowError) as error:
            kind = PortInUse if getattr(error, "errno", None) == errno.EADDRINUSE else Failure
            raise kind(_reason(host, port, option, error)) from error
        self.threads = [
            threading.Thread(target=self._serve, name=f"apoq-http-{number}", daemon=True)
            for number in range(1, THREADS + 1)
        ]
        self._is_closed = False
        self.names = list(pages)

    @property
    def url(self) -> str:
        """The URL of the server."""
        host, port = self._server.server_address[:2]
        name = str(host) if isinstance(host, str) else host.decode()
        return f"http://{f'[{name}]' if ':' in name else name}:{port}"

    def start(self) -> None:
        """Serve from now on."""
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        """Accept no more requests."""
        self._is_closed = True
        with suppress(OSError):
            self._server.socket.shutdown(socket.SHUT_RDWR)  # wakes the threads that wait for a client
        self._server.server_close()

    def _serve(self) -> None:
        while not self._is_closed:
            try:
                request, address = self._server.get_request()
            except OSError:
                continue  # closed, or the client has gone already
            try:
                self._server.finish_request(request, address)
            except (OSError, ValueError):
                pass  # the client has gone, or has sent something else than HTTP
            except Exception:
                logger.exception("a request could not be served")
            finally:
                with suppress(OSError):
                    self._server.shutdown_request(request)


class _Server(HTTPServer):
    def __init__(self, host: str, port: int, pages: Mapping[str, Page]) -> None:
        self.pages = pages
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # Without the name of the host, which a slow resolver would be asked for.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = CLIENT_TIMEOUT_SECONDS
    server_version = "apoq"
    sys_version = ""

    def do_GET(self) -> None:
        page = self.server.pages.get(urlsplit(self.path).path)
        if page is None:
            names = ", ".join(self.server.pages)
            self._send(Response(404, f"there is no such page: choose one of {names}\n".encode()))
            return
        try:
            response = page(self.headers.get("Accept", ""))
        except Exception:
            logger.exception("%s failed", self.path)
            response = Response(500, b"this page failed; see the log\n")
        self._send(response)

    do_HEAD = do_GET  # noqa: N815 - the name that BaseHTTPRequestHandler looks for

    def _send(self, response: Response) -> None:
        self.send_response(response.status)
        self.send_header("Content-Type", response.content_type)
        self.send_header("Content-Length", str(len(response.body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing, because there are many scrapes."""


def _reason(host: str, port: int, option: str, error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE:
        return f"port {port} on {host} is in use: end the program that uses it, or choose another {option}"
    if number == errno.EACCES:
        return f"port {port} on {host} needs more rights: choose a {option} above 1023"
    return f"port {port} on {host} can't be used: {error}: correct {option} or --bind"
