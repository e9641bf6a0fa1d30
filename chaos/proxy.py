"""What lies between a client and the server: a line that can be cut, without either side being told."""

from __future__ import annotations

import math
import socket
import threading
import time
from contextlib import suppress

from chaos.server import free_port

CATCH_UP = 0.1
"""Seconds of its speed that a link may be late."""


class Link:
    """A link that carries so many bytes a second, of all connections together."""

    def __init__(self, speed: float) -> None:
        self._speed = speed
        self._is_free_at = 0.0
        self._lock = threading.Lock()

    def carry(self, size: int) -> None:
        """Wait until so many bytes are through."""
        now = time.monotonic()
        with self._lock:
            # What a sleep takes too long, on a busy machine, is made up for.
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
        """Close both sides, and let whoever waits for the line to flow see that."""
        self.is_over = True
        self.flows.set()
        for side in (self.client, self.server):
            if side is not None:
                with suppress(OSError):
                    side.shutdown(socket.SHUT_RDWR)
                side.close()


class Proxy:
    """Leads connections to a port of this machine, each by two threads.

    While it is cut, no byte, no FIN and no RST comes through, either way. What was on its way arrives when
    the line is mended, as TCP would send it again, unless the line stays dead: then it never does.
    `speed` is how many bytes it carries in a second.
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
        """Let nothing through any more."""
        with self._lock:
            self._is_cut = True
            # By now, the server's own keepalives would have found out about those of an earlier cut.
            self._bury()
            for line in self._lines:
                line.flows.clear()

    def mend(self, *, old_stay_dead: bool = False) -> None:
        """Let everything through; `old_stay_dead`: only on connections that are made from now on."""
        with self._lock:
            self._is_cut = False
            if old_stay_dead:
                self._dead += self._lines
                self._lines = []
            for line in self._lines:
                line.flows.set()

    def lead_to(self, port: int) -> None:
        """Close all connections, and lead new ones elsewhere."""
        with self._lock:
            self._leads_to = port
            for line in self._lines:
                line.close()
            self._lines = []

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._socket.close()
        with self._lock:
            self._bury()
            for line in self._lines:
                line.close()

    def _bury(self) -> None:
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
        except OSError:  # nobody is there, or the line was closed meanwhile
            line.close()
            return
        pair = (line.client, line.server)
        threading.Thread(target=_pump, args=(line, *pair), daemon=True).start()
        _pump(line, *reversed(pair))


def _pump(line: Line, source: socket.socket, target: socket.socket) -> None:
    """Carry bytes one way until one side closes."""
    with suppress(OSError):
        while data := source.recv(65_536):
            line.link.carry(len(data))
            line.flows.wait()
            target.sendall(data)
    line.flows.wait()
    line.close()
