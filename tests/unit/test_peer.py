"""What a deep smoke waits for: spans, until they are there; and a stream of events, never at its end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests

from pipeline import conversation, peer
from pipeline.container import Server
from pipeline.probes import Subject
from pipeline.settings import Settings
from tests.servers import until


@pytest.fixture
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Serve what the test names."""
    with ThreadingHTTPServer(("127.0.0.1", 0), request.param) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class Silent(BaseHTTPRequestHandler):
    """A server whose stream of events says one thing, and nothing more until it is told to."""

    protocol_version = "HTTP/1.1"
    over = threading.Event()

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        line = b'data: {"type": "server.connected"}\n\n'
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        self.over.wait(30)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "11")
        self.end_headers()
        self.wfile.write(b'{"id": "s"}')

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize("url", [Silent], indirect=True)
def test_the_end_of_a_conversation_waits_for_no_event(url: str) -> None:
    try:
        with conversation.begun(Subject(Settings(), Server(url))) as talk:
            until(lambda: talk.events)
            began = time.monotonic()
        assert time.monotonic() - began < 0.9, "nor does it give up on the thread that listens, after a second"
        assert (talk.session, talk.events) == ("s", [{"type": "server.connected"}])
    finally:
        Silent.over.set()


@pytest.mark.parametrize("url", [peer.Handler], indirect=True)
def test_the_peer_answers_when_there_are_spans_of_both_kinds(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "seen", {"resources": [], "spans": 0, "traces": "", "faults": []})
    assert requests.get(f"{url}/seen?0.1", timeout=5).json()["spans"] == 0
    attributes = [{"key": "service.name", "value": {"stringValue": "it"}}]
    batch = {"resource": {"attributes": attributes}, "scopeSpans": [{"spans": [1, 2]}]}
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(requests.get, f"{url}/seen?20", timeout=30)
        requests.post(f"{url}/v1/traces", data=json.dumps({"resourceSpans": [batch]}), timeout=5)
        assert not waiting.done()
        requests.put(f"{url}/v0.4/traces", data=b"\x93\xacsqlite.query\x01", timeout=5)
        got = waiting.result(10).json()
    assert got == {"resources": [{"service.name": "it"}], "spans": 2, "traces": " sqlite.query ", "faults": []}
