"""A proxy between clients and the server, which can cut connections without either side noticing."""

from __future__ import annotations

import math
import socket
import threading
import time
from contextlib import suppress

from chaos.server import free_port

CATCH_UP = 0.1
"""Seconds of delay for which a link may catch up."""


class Link:
    """A link with a limited speed in bytes per second, shared by all connections."""

    def __init__(self, speed: float) -> None:
        self._speed = speed
        self._is_free_at = 0.0
        self._lock = threading.Lock()

    def carry(self, size: int) -> None:
        """Wait until so many bytes have been transferred."""
        now = time.monotonic()
        with self._lock:
            # Catches up if a sleep took too long on a busy machine.
            self._is_free_at = max(self._is_free_at, now - CATCH_UP) + size / self._speed
            pause = self._is_free_at - now
        time.sleep(max(0.0, pause))


class Line:
    """One connection through the proxy."""

    def __init__(self, client: socket.socket, link: Link) -> None:
        self.client = client
        self.link = link
        self.server: socket.socket | None = None
        self.flows = threading.Event()
        self.is_over = False

    def close(self) -> None:
        """Close both sides, and wake the threads that wait for the line."""
        self.is_over = True
        self.flows.set()
        for side in (self.client, self.server):
            if side is not None:
                with suppress(OSError):
                    side.shutdown(socket.SHUT_RDWR)
                side.close()


class Proxy:
    """Forwards connections to a port of this machine, with two threads for each.

    While it is cut, no byte, no FIN and no RST passes in either direction. Bytes that were on their way
    arrive when the connection is restored, because TCP would send them again. If the connection stays dead,
    they never arrive. `speed` is the number of bytes per second.
    """

    def __init__(self, port: int, speed: float = math.inf) -> None:
        self.port = free_port()
        self._link = Link(speed)
        self._leads_to = port
        self._is_cut = False
        self._lock = threading.Lock()
        self._lines: list[Line] = []
        self._dead: list[Line] = []
        self._socket = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Stop forwarding."""
        with self._lock:
            self._is_cut = True
            # By now, the server's own keepalives would have detected the dead connections of an earlier cut.
            self._close_dead()
            for line in self._lines:
                line.flows.clear()

    def restore(self, *, old_stay_dead: bool = False) -> None:
        """Forward again; with `old_stay_dead`, only connections that are made from now on."""
        with self._lock:
            self._is_cut = False
            if old_stay_dead:
                self._dead += self._lines
                self._lines = []
            for line in self._lines:
                line.flows.set()

    def lead_to(self, port: int) -> None:
        """Close all connections, and forward new ones to another port."""
        with self._lock:
            self._leads_to = port
            for line in self._lines:
                line.close()
            self._lines = []

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts connections
        self._socket.close()
        with self._lock:
            self._close_dead()
            for line in self._lines:
                line.close()

    def _close_dead(self) -> None:
        for line in self._dead:
            line.close()
        self._dead = []

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                line = Line(client, self._link)
                with self._lock:
                    self._lines = [old for old in self._lines if not old.is_over]
                    self._lines.append(line)
                    if not self._is_cut:
                        line.flows.set()
                threading.Thread(target=self._connect, args=(line,), daemon=True).start()

    def _connect(self, line: Line) -> None:
        line.flows.wait()
        try:
            line.server = socket.create_connection(("127.0.0.1", self._leads_to), timeout=2)
            line.server.settimeout(None)
            for side in (line.client, line.server):
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:  # the server isn't running, or the line was closed meanwhile
            line.close()
            return
        pair = (line.client, line.server)
        threading.Thread(target=_pump, args=(line, *pair), daemon=True).start()
        _pump(line, *reversed(pair))


def _pump(line: Line, source: socket.socket, target: socket.socket) -> None:
    """Forward bytes in one direction until one side closes."""
    with suppress(OSError):
        while data := source.recv(65_536):
            line.link.carry(len(data))
            line.flows.wait()
            target.sendall(data)
    line.flows.wait()
    line.close()
