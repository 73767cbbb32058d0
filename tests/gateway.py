"""The gateway on loopback: Caddy with deploy/gateway, in front of an upstream on this machine."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from pipeline.core.settings import ROOT
from tests.servers import free_port, until

PASSWORD = "of-the-gateway"  # noqa: S105 -- of a server that a test makes
UPSTREAM_PASSWORD = "of-the-upstream"  # noqa: S105 -- of a server that a test makes


@dataclass(frozen=True)
class Gateway:
    """A running gateway; ``log`` is what it prints."""

    port: int
    log: Path = Path("/dev/null")
    scheme: str = "http"
    password: str = PASSWORD

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def basic(self) -> str:
        """What a client with the password sends as Authorization."""
        return "Basic " + base64.b64encode(f"opencode:{self.password}".encode()).decode()

    def ask(
        self,
        path: str = "/",
        method: str = "GET",
        *,
        anonymous: bool = False,
        data: bytes | Iterator[bytes] | None = None,
        **headers: Any,
    ) -> requests.Response:
        """Send a request; ``Sec_Fetch_Site="x"`` is the header Sec-Fetch-Site."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if not anonymous:
            named["Authorization"] = self.basic
        url = f"{self.url}{path}"
        return requests.request(
            method, url, headers=named, data=data, timeout=60, allow_redirects=False
        )

    def upgrade(self, path: str, **headers: str) -> tuple[int, socket.socket]:
        """Ask for a WebSocket; return the status and the connection."""
        fields = {
            "Host": f"127.0.0.1:{self.port}",
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
            **headers,
        }
        peer = socket.create_connection(("127.0.0.1", self.port), 60)
        lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        peer.sendall("\r\n".join([*lines, "", ""]).encode())
        head = b""
        while b"\r\n\r\n" not in head and (more := peer.recv(1)):
            head += more
        return int(head.split()[1]), peer


@contextlib.contextmanager
def gateway(upstream: int, **env: str) -> Iterator[Gateway]:
    """Run deploy/gateway/start.sh in front of a port of this machine."""
    port = free_port()
    with tempfile.TemporaryDirectory() as home:
        log = Path(home) / "log"
        variables = {
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
            "HOME": home,
            "GATEWAY_PASSWORD": PASSWORD,
            "OPENCODE_SERVER_PASSWORD": UPSTREAM_PASSWORD,
            "GATEWAY_PORT": str(port),
            "UPSTREAM": f"127.0.0.1:{upstream}",
        }
        with log.open("wb") as file:
            child = subprocess.Popen(
                [ROOT / "deploy/gateway/start.sh"],
                env={**variables, **env},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )

        def listens() -> bool:
            assert child.poll() is None, log.read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return True
            return False

        try:
            until(listens, "the gateway listens")
            yield Gateway(port, log, "https" if env.get("GATEWAY_TLS") else "http")
        finally:
            child.terminate()
            child.wait(30)


def refuses_what_opencode_takes(front: Gateway) -> None:
    """Assert what OpenCode 1.18.33 does not refuse by itself; each line fails without a gateway."""
    status, peer = front.upgrade("/pty/pty_1/connect?ticket=x&directory=/tmp")
    peer.close()
    assert status == 401
    foreign = {"Origin": "https://evil.example", "Authorization": front.basic}
    status, peer = front.upgrade("/pty/pty_1/connect?ticket=x&directory=/tmp", **foreign)
    peer.close()
    assert status == 403
    for origin, site in (
        ("https://evil.example", "cross-site"),
        ("http://127.0.0.1:1", "same-site"),
    ):
        headers: dict[str, Any] = {
            "Origin": origin,
            "Sec_Fetch_Site": site,
            "Content_Type": "text/plain",
        }
        for path in ("/session", "/pty", "/mcp", "/instance/dispose"):
            assert front.ask(path, "POST", data=b"{}", **headers).status_code == 403
    assert front.ask("/config", Host="evil.example").status_code == 421
    assert front.ask(f"/config?auth_token={front.basic[6:]}", anonymous=True).status_code == 400
    assert front.ask("/config").status_code == 200
