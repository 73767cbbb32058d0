"""deploy/gateway: what Caddy lets through to OpenCode, and what it refuses."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import requests

from pipeline.core.settings import Stack
from pipeline.stack import gateway as stack_gateway
from tests.gateway import PASSWORD, UPSTREAM_PASSWORD, Gateway, gateway
from tests.servers import free_port, until

pytestmark = pytest.mark.server

BASIC = "Basic " + base64.b64encode(f"opencode:{PASSWORD}".encode()).decode()
MEGABYTE = 1024 * 1024


class Upstream(ThreadingHTTPServer):
    """Answers as OpenCode does: JSON, a stream of events, a WebSocket that repeats what it gets."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        self.seen: list[str] = []
        self.passwords: set[str] = set()
        self.bodies: list[int] = []
        self.go_on = threading.Event()
        super().__init__(("127.0.0.1", port), Handler)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def do_GET(self) -> None:
        self.server.seen.append(f"{self.command} {self.path}")
        self.server.passwords.add(self.headers.get("Authorization", ""))
        if self.headers.get("Upgrade"):
            self._repeat()
        elif self.path == "/event":
            self._events()
        else:
            if self.headers.get("Transfer-Encoding"):
                self._count()
                return
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

    def _repeat(self) -> None:
        self.send_response(101)
        self.send_header("Connection", "Upgrade")
        self.send_header("Upgrade", "websocket")
        self.end_headers()
        while data := self.connection.recv(100):
            self.connection.sendall(data)
        self.close_connection = True

    def _count(self) -> None:
        """Read a body in chunks, and record how many bytes came before it ended."""
        total = 0
        with contextlib.suppress(OSError, ValueError):
            while size := int(self.rfile.readline(), 16):
                total += len(self.rfile.read(size))
                self.rfile.readline()
        self.server.bodies.append(total)
        self.close_connection = True

    def _events(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b"data: first\n\n")
        self.server.go_on.wait(60)
        self.wfile.write(b"data: second\n\n")
        self.close_connection = True

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Say nothing on the test's stderr."""


@pytest.fixture(scope="module")
def server() -> Iterator[Upstream]:
    with Upstream() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def front(server: Upstream) -> Iterator[Gateway]:
    with gateway(server.server_port, GATEWAY_HOST="agents.example") as made:
        yield made


@pytest.fixture
def reached(server: Upstream) -> list[str]:
    """What reaches the upstream in this test."""
    server.seen.clear()
    return server.seen


def test_with_the_password_everything_passes_and_opencode_gets_its_own(
    front: Gateway, server: Upstream, reached: list[str]
) -> None:
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        assert front.ask("/session?directory=/w", method, data=b"{}").status_code == 200
    assert reached == [
        f"{method} /session?directory=/w" for method in ("GET", "POST", "PUT", "PATCH", "DELETE")
    ]
    inner = base64.b64encode(f"opencode:{UPSTREAM_PASSWORD}".encode()).decode()
    assert server.passwords == {f"Basic {inner}"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Basic " + base64.b64encode(b"opencode:wrong").decode()},
        {"Authorization": BASIC + "x"},
        {"Authorization": BASIC[:-4]},
        {"Authorization": BASIC.replace("Basic", "Bearer")},
        {"Cookie": f"Authorization={BASIC}"},
        {"Proxy-Authorization": BASIC},
    ],
)
def test_without_the_password_nothing_reaches_opencode(
    front: Gateway, reached: list[str], headers: dict[str, Any]
) -> None:
    for method in ("GET", "HEAD", "POST", "OPTIONS", "TRACE"):
        for path in (
            "/",
            "/config",
            "/pty/x/connect?ticket=x&directory=/a",
            "//config",
            "/%2e%2e/",
        ):
            answer = front.ask(path, method, anonymous=True, **headers)
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"].startswith("Basic ")
    status, peer = front.upgrade("/pty/pty_1/connect?ticket=x&directory=/tmp", **headers)
    peer.close()
    assert (status, reached) == (401, [])


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:4096", "localhost.evil.example", "1.2.3.4"]
)
def test_a_foreign_host_is_refused(front: Gateway, reached: list[str], host: str) -> None:
    assert front.ask(Host=host).status_code == 421
    status, peer = front.upgrade("/pty/x/connect", Host=host, Authorization=BASIC)
    peer.close()
    assert (status, reached) == (421, [])


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "[::1]:4096", "agents.example", "AGENTS.example:1"]
)
def test_the_names_of_the_server_pass(front: Gateway, host: str) -> None:
    assert front.ask(Host=host).status_code == 200
    assert front.ask("/session", "POST", Host=host, Origin=f"https://{host}").status_code == 200


def test_pages_of_other_origins_can_neither_change_nor_read_anything(
    front: Gateway, reached: list[str]
) -> None:
    for origin in ("https://evil.example", "http://127.0.0.1:1", "http://127.0.0.1", "null"):
        for path in ("/session", "/pty", "/mcp", "/instance/dispose"):
            for method in ("POST", "PUT", "PATCH", "DELETE", "GET"):
                answer = front.ask(
                    path, method, data=b"{}", Origin=origin, Content_Type="text/plain"
                )
                assert answer.status_code == 403
                assert "Access-Control-Allow-Origin" not in answer.headers
        status, peer = front.upgrade("/pty/x/connect", Origin=origin, Authorization=BASIC)
        peer.close()
        assert status == 403
    for site in ("cross-site", "same-site"):
        for method, mode in (("POST", "navigate"), ("POST", "no-cors"), ("GET", "no-cors")):
            fetch: dict[str, Any] = {"Sec_Fetch_Site": site, "Sec_Fetch_Mode": mode}
            assert front.ask("/session", method, **fetch).status_code == 403
    assert reached == []


def test_pages_of_its_own_and_links_to_it_pass(front: Gateway) -> None:
    own: dict[str, Any] = {
        "Origin": front.url,
        "Sec_Fetch_Site": "same-origin",
        "Sec_Fetch_Mode": "cors",
    }
    assert front.ask("/session", "POST", **own).status_code == 200
    assert front.ask("/", Sec_Fetch_Site="none", Sec_Fetch_Mode="navigate").status_code == 200
    assert front.ask("/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate").status_code == 200


@pytest.mark.parametrize("query", ["auth_token=x", "a=1&auth_token=", "%61uth_token=x"])
def test_credentials_in_the_url_are_refused(front: Gateway, reached: list[str], query: str) -> None:
    for anonymous in (True, False):
        assert front.ask(f"/config?{query}", anonymous=anonymous).status_code == 400
    assert reached == []


def test_bodies_and_headers_are_bounded(front: Gateway, reached: list[str]) -> None:
    assert front.ask("/session", "POST", data=b"x" * 8 * MEGABYTE).status_code == 200
    with socket.create_connection(("127.0.0.1", front.port), 60) as peer:
        head = f"POST /session HTTP/1.1\r\nHost: localhost\r\nAuthorization: {BASIC}\r\n"
        peer.sendall(f"{head}Content-Length: {100 * MEGABYTE}\r\n\r\n".encode())
        assert peer.recv(1000).startswith(b"HTTP/1.1 413")
    assert front.ask(X_Large="x" * 64 * 1024).status_code == 431
    assert reached == ["POST /session"]


def test_a_body_without_a_size_is_cut_off(front: Gateway, server: Upstream) -> None:
    server.bodies.clear()
    parts = (b"x" * MEGABYTE for _ in range(120))
    with contextlib.suppress(requests.ConnectionError):
        assert front.ask("/session", "POST", data=parts).status_code in (413, 502)
    until(lambda: server.bodies, "the upstream has read what it got")
    assert 90 * MEGABYTE < server.bodies[0] <= 100 * MEGABYTE


def test_a_client_that_does_not_finish_its_headers_is_disconnected(front: Gateway) -> None:
    with socket.create_connection(("127.0.0.1", front.port), 60) as peer:
        peer.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        began = time.monotonic()
        assert b"200" not in peer.recv(1000)
        assert time.monotonic() - began > 3


def test_events_pass_one_by_one(front: Gateway, server: Upstream) -> None:
    server.go_on.clear()
    peer = socket.create_connection(("127.0.0.1", front.port), 60)
    with peer, peer.makefile("rb") as stream:
        head = f"GET /event HTTP/1.1\r\nHost: localhost\r\nAuthorization: {BASIC}\r\n\r\n"
        peer.sendall(head.encode())
        lines = iter(stream.readline, b"")
        assert any(line == b"data: first\n" for line in lines)
        server.go_on.set()
        assert any(line == b"data: second\n" for line in lines)


def test_websockets_pass_both_ways(front: Gateway) -> None:
    for headers in ({}, {"Origin": front.url, "Sec-Fetch-Site": "same-origin"}):
        status, peer = front.upgrade("/pty/x/connect?ticket=t", Authorization=BASIC, **headers)
        with peer:
            assert status == 101
            for message in (b"first", b"second"):
                peer.sendall(message)
                assert peer.recv(100) == message


def test_the_log_names_requests_without_secrets(front: Gateway) -> None:
    front.ask(
        "/logged/path?ticket=of-a-user&directory=/private",
        Referer="http://localhost/?ticket=of-a-user",
    )
    wrong = base64.b64encode(b"opencode:mistyped").decode()
    front.ask("/logged/wrong", anonymous=True, Authorization=f"Basic {wrong}")
    until(lambda: "/logged/wrong" in front.log.read_text(), "the request is logged")
    said = front.log.read_text()
    entry = next(json.loads(line) for line in said.splitlines() if "/logged/path" in line)
    assert (entry["status"], entry["request"]["uri"]) == (200, "/logged/path")
    assert entry["request"]["method"] == "GET"
    for secret in (PASSWORD, UPSTREAM_PASSWORD, BASIC[6:], wrong, "of-a-user", "private"):
        assert secret not in said


def test_a_request_waits_while_opencode_restarts() -> None:
    upstream = free_port()
    with gateway(upstream) as front, futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(front.ask, "/config")
        with pytest.raises(futures.TimeoutError):
            answer.result(1)
        with Upstream(upstream) as late:
            threading.Thread(target=late.serve_forever).start()
            assert answer.result(30).status_code == 200
            assert late.seen == ["GET /config"]
            late.shutdown()


def test_opencode_that_does_not_answer_is_a_502_without_secrets_in_the_log() -> None:
    with gateway(free_port()) as front:
        assert front.ask("/config?ticket=of-a-user").status_code == 502
        assert front.ask("/config", anonymous=True).status_code == 401
        said = until(
            lambda: re.search("connection refused", front.log.read_text()) and front.log.read_text()
        )
    for secret in ("of-a-user", BASIC[6:], UPSTREAM_PASSWORD):
        assert secret not in said


@pytest.mark.parametrize("host", ["agents.example", "127.0.0.1"])
def test_tls_of_its_own_authority_is_one_setting(server: Upstream, host: str) -> None:
    with gateway(server.server_port, GATEWAY_TLS="internal", GATEWAY_HOST=host) as front:
        root = front.log.parent / ".local/share/caddy/pki/authorities/local/root.crt"
        until(root.exists, "the gateway's authority")
        context = ssl.create_default_context(cafile=root)

        def answer() -> bytes:
            raw = socket.create_connection(("127.0.0.1", front.port), 60)
            # The certificate is made while the gateway listens already.
            with (
                contextlib.suppress(ssl.SSLError),
                context.wrap_socket(raw, server_hostname=host) as peer,
            ):
                head = f"GET / HTTP/1.1\r\nHost: {host}\r\nAuthorization: {BASIC}\r\n\r\n"
                peer.sendall(head.encode())
                return peer.recv(1000)
            return b""

        assert until(answer, "the certificate is made").startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "setting",
    [{}, {"tls": "internal", "host": "agents.example"}, {"tls": "internal", "host": "127.0.0.1"}],
)
def test_the_stack_asks_through_the_published_port(
    server: Upstream, setting: dict[str, Any]
) -> None:
    stack = Stack.model_validate(setting)
    words = {"GATEWAY_HOST": stack_gateway.host(stack)}
    if stack.tls != "none":
        words["GATEWAY_TLS"] = stack.tls
    with gateway(server.server_port, **words) as front:
        stack = stack.model_copy(update={"port": front.port})
        until(lambda: not stack_gateway.problem(stack, "opencode", PASSWORD), "it answers")
        assert "status 401" in stack_gateway.problem(stack, "opencode", "wrong")
    assert "does not answer" in stack_gateway.problem(stack, "opencode", PASSWORD)


@pytest.mark.parametrize(
    ("setting", "url"),
    [
        ({}, "http://127.0.0.1:4096"),
        ({"address": "0.0.0.0", "port": 1}, "http://localhost:1"),  # noqa: S104
        ({"address": "10.0.0.5"}, "http://10.0.0.5:4096"),
        ({"host": "agents.example", "tls": "acme", "port": 443}, "https://agents.example:443"),
    ],
)
def test_the_url_for_clients(setting: dict[str, Any], url: str) -> None:
    assert stack_gateway.url(Stack.model_validate(setting)) == url


def test_without_a_password_it_does_not_start(server: Upstream) -> None:
    with (
        pytest.raises(AssertionError, match="GATEWAY_PASSWORD: is empty"),
        gateway(server.server_port, GATEWAY_PASSWORD=""),
    ):
        pass
