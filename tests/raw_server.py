"""A server that sends bytes as it is told, HTTP or not."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import time
from collections.abc import Callable

Send = Callable[[socket.socket], None]
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKS = OK + b"Transfer-Encoding: chunked\r\n\r\n"


Cases = dict[str, tuple[Send, str]]


class RawServer(socketserver.ThreadingTCPServer):
    """Reads a request's beginning, and then sends as the case says whose number stands in its path."""

    daemon_threads = True

    def __init__(self, cases: Cases) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.sends = [send for send, _ in cases.values()]

    def finish_request(self, request: socket.socket, client_address: object) -> None:
        with contextlib.suppress(OSError):
            self.sends[int(request.recv(65536).split(b"/")[1])](request)


def once(data: bytes) -> Send:
    return lambda connection: connection.sendall(data)


def forever(first: bytes, part: bytes, pause: float = 0.0) -> Send:
    def send(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(part)
            time.sleep(pause)

    return send
