"""A real git server over HTTP on loopback (``git http-backend``), with faults that a test can ask
for.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast


@dataclass
class Fault:
    """What goes wrong: a ``status``; or silence, or a closed connection, ``after`` that many bytes of a transfer.

    ``after`` 0 is before the first answer. ``times`` is how many requests it spoils.
    """

    kind: str  # "status", "silence" or "cut"
    status: int = 500
    after: int = 0
    times: int = 1_000_000


@dataclass
class Server:
    root: Path
    url: str = ""
    fault: Fault | None = None
    old: bool = False  # speaks only version 0 of the protocol, so hands out nothing but tips
    requests: int = 0
    sent: int = 0  # bytes
    silent: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def heal(self) -> None:
        self.fault = None
        self.released.set()

    def spoil(self, fault: Fault) -> None:
        self.silent, self.released = threading.Event(), threading.Event()
        self.fault = fault


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = cast("_HTTPServer", self.server).state
        server.requests += 1
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self._due(server)
        if fault and fault.kind == "status":
            self.send_error(fault.status)
            return
        if fault and not fault.after:
            self._stop(server, fault)
            return
        path, _, query = self.path.partition("?")
        backend = subprocess.run(
            ["git", "http-backend"],
            input=body,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=False,  # it also ends with 128 when it has told the client why
            env={
                "PATH": os.environ["PATH"],
                "GIT_PROJECT_ROOT": str(server.root),
                "GIT_HTTP_EXPORT_ALL": "1",
                "PATH_INFO": path,
                "QUERY_STRING": query,
                "REQUEST_METHOD": self.command,
                "CONTENT_TYPE": self.headers.get("Content-Type", ""),
                "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
                "HTTP_GIT_PROTOCOL": "" if server.old else self.headers.get("Git-Protocol", ""),
            },
        )
        head, _, content = backend.stdout.partition(b"\r\n\r\n")
        server.sent += len(content)
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        self.send_response(int(fields.pop("Status", "200").split()[0]))
        for name, value in fields.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client may be killed at any moment
            if fault and len(content) > fault.after:
                self.wfile.write(content[: fault.after])
                self.wfile.flush()
                self._stop(server, fault)
            else:
                self.wfile.write(content)

    do_POST = do_GET  # noqa: N815 -- the name http.server looks for

    def _due(self, server: Server) -> Fault | None:
        fault = server.fault
        # A fault "after" some bytes is for the transfer of a pack, not for the greeting before it.
        if (
            fault is None
            or fault.times == 0
            or (fault.after and "git-upload-pack" not in self.path.split("?")[0])
        ):
            return None
        fault.times -= 1
        return fault

    def _stop(self, server: Server, fault: Fault) -> None:
        if fault.kind == "silence":
            server.silent.set()
            server.released.wait(60)
        self.close_connection = True

    def log_message(self, *_args: object) -> None:
        """Say nothing."""


class _HTTPServer(http.server.ThreadingHTTPServer):
    def __init__(self, state: Server) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.state = state

    def handle_error(self, *_args: object) -> None:
        """Say nothing: clients that are killed are what this is for."""


@contextlib.contextmanager
def serve(root: Path, certificate: Path | None = None) -> Iterator[Server]:
    """Serve the repositories in ``root``, as ``{url}/NAME``; over TLS with a PEM file of key and
    certificate.
    """
    state = Server(root)
    with _HTTPServer(state) as httpd:
        state.url = f"http://127.0.0.1:{httpd.server_port}"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
            state.url = f"https://127.0.0.1:{httpd.server_port}"
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield state
        finally:
            state.heal()
            httpd.shutdown()
            thread.join()
