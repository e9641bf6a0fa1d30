"""A network between a worker and its server that can be cut without a word, as no loopback can."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

import sqlalchemy as sa


class Proxy:
    """Forwards to the server of `url`; while it is cut, nothing gets through, and nobody is told.

    What was connected before a cut stays dead after it, as behind a firewall that has forgotten it.
    """

    def __init__(self, url: sa.URL, port: int = 0) -> None:
        self._target = url
        self._listening = socket.create_server(("127.0.0.1", port))
        self.is_cut = False
        self._pairs: list[Pair] = []
        self.url = sa.make_url(
            f"postgresql+psycopg://{url.username}@127.0.0.1:{self._listening.getsockname()[1]}/{url.database}"
        ).set(password=url.password)
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self.is_cut = True
        for pair in self._pairs:
            pair.is_dead = True

    def drop(self) -> None:
        """Tell the clients that their connections are gone, and not the server."""
        for pair in self._pairs:
            pair.drop()

    def heal(self) -> None:
        self.is_cut = False

    def close(self) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # or else whoever waits in `accept` gets one more
        self._listening.close()
        for pair in self._pairs:
            pair.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                pair = Pair(client, self._connect())
                pair.is_dead = self.is_cut
                self._pairs.append(pair)

    def _connect(self) -> socket.socket:
        host = str(self._target.query.get("host") or self._target.host or "localhost")
        port = int(str(self._target.query.get("port") or self._target.port or 5432))
        if not host.startswith("/"):
            return socket.create_connection((host, port))
        server = socket.socket(socket.AF_UNIX)
        server.connect(f"{host}/.s.PGSQL.{port}")
        return server


class Pair:
    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self._sockets = (client, server)
        self.is_dead = False
        for source, target in (self._sockets, self._sockets[::-1]):
            threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def drop(self) -> None:
        self.is_dead = True
        with suppress(OSError):
            self._sockets[0].shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if not self.is_dead:
                    target.sendall(data)
        # An end, too, is something that doesn't get through.
        if not self.is_dead:
            self.close()
