"""A TCP proxy on 127.0.0.1 that stands before a server and does what networks and servers do on bad days."""

import itertools
import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 1 << 16
_ERROR_BODY = b"<Error><Code>InternalError</Code><Message>We encountered an internal error</Message></Error>"
_ERROR = (
    b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_ERROR_BODY), _ERROR_BODY)
)


class FaultProxy:
    """Passes bytes on as they are, host names and signatures included, until it is told to misbehave.

    Args:
        target_port: of the server behind it; it may go away and come back.
        port: its own.
    """

    def __init__(self, target_port: int, port: int = 0) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", port), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._failing = False
        self._turns = itertools.count()
        self._to_lose: bytes | None = None
        self.failed = 0
        """Connections that met an outage."""
        self.lost_answers = 0
        """Requests that the server carried out, and whose answers nobody got."""

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        self._cut()

    def begin_outage(self) -> None:
        """Cut every connection; from now on new ones get a 500 or, in turn, silence without end."""
        self._failing = True
        self._cut()

    def end_outage(self) -> None:
        """Serve new connections again; the silent ones stay silent."""
        self._failing = False

    def lose_answer_to(self, request: bytes) -> None:
        """Pass on the next request that contains ``request``, and cut the connection instead of answering."""
        self._to_lose = request

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        if self._failing:
            self._fail(client)
            return
        try:
            server = socket.create_connection(("127.0.0.1", self._target_port), timeout=10)
        except OSError:
            client.close()
            return
        server.settimeout(None)
        with self._lock:
            self._open |= {client, server}
        losing = threading.Event()
        threading.Thread(target=self._answers, args=(server, client, losing), daemon=True).start()
        self._requests(client, server, losing)

    def _requests(self, client: socket.socket, server: socket.socket, losing: threading.Event) -> None:
        with suppress(OSError):
            while chunk := client.recv(_CHUNK_BYTES):
                with self._lock:
                    if self._to_lose is not None and self._to_lose in chunk:
                        self._to_lose = None
                        losing.set()
                server.sendall(chunk)
        self._close(client, server)

    def _answers(self, server: socket.socket, client: socket.socket, losing: threading.Event) -> None:
        with suppress(OSError):
            while chunk := server.recv(_CHUNK_BYTES):
                if losing.is_set():
                    self.lost_answers += 1
                    break
                client.sendall(chunk)
        self._close(client, server)

    def _fail(self, client: socket.socket) -> None:
        """A 500 for one, silence for the next; held until the client gives up."""
        with self._lock:
            turn = next(self._turns)
            self.failed += 1
        with suppress(OSError), client:
            client.recv(_CHUNK_BYTES)
            if turn % 2 == 0:
                client.sendall(_ERROR)
                client.shutdown(socket.SHUT_WR)
            while client.recv(_CHUNK_BYTES):
                pass

    def _cut(self) -> None:
        with self._lock:
            held = list(self._open)
        self._close(*held)

    def _close(self, *sockets: socket.socket) -> None:
        with self._lock:
            self._open -= set(sockets)
        for one in sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
            one.close()
