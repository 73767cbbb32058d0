"""Restore over the network: act as the replication master of the target, for as long as it loads.

The target replaces everything that it holds. An RDB file that it cannot load terminates it: the
caller checks both first.
"""

import contextlib
import hmac
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread, current_thread, main_thread
from typing import IO, Any

import redis

from lib.backup import process
from lib.backup.errors import CopyCut, Failure, TargetCannotReachUs, TargetInUse
from lib.backup.redis_source import (
    connect,
    get_config,
    info,
    rdb_version,
    title,
    unreachable,
)
from lib.backup.settings import Settings
from lib.common.databases import Database

USER_PREFIX = "opencode-restore-"
"""The target authenticates as such a user: a later restore recognizes what a killed one left."""
ATTEMPTS = 3
"""How often a target may ask for the whole data. One that cannot load it asks for ever."""

PING_SECONDS = 5
POLL_SECONDS = 0.05
CHUNK = 1 << 18


class Master:
    """A listener that sends one RDB file to each peer that authenticates, and then pings."""

    def __init__(self, source: Path, host: str, port: int) -> None:
        self.user = USER_PREFIX + secrets.token_hex(8)
        self.password = secrets.token_hex(32)
        self.sent = 0
        self.attempts = 0
        self._source = source
        self._over = Event()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family)
        self._listener.settimeout(0.1)
        self.port = self._listener.getsockname()[1]
        self._thread = Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._over.set()
        self._thread.join(10)
        self._listener.close()

    def _serve(self) -> None:
        while not self._over.is_set():
            # A peer that sends garbage, or disconnects, may connect again.
            with contextlib.suppress(OSError, ValueError):
                peer, _ = self._listener.accept()
                peer.settimeout(PING_SECONDS)
                with peer, peer.makefile("rb") as lines:
                    self._answer(peer, lines)

    def _answer(self, peer: socket.socket, lines: IO[bytes]) -> None:
        known = False
        while not self._over.is_set():
            words = read_command(lines)
            name = words[0].upper() if words else b""
            if name == b"AUTH":
                expected = f"{self.user} {self.password}".encode()
                known = hmac.compare_digest(b" ".join(words[1:]), expected)
                peer.sendall(b"+OK\r\n" if known else b"-WRONGPASS no\r\n")
            elif name == b"PING":
                # A replica sends PING before AUTH, and continues after NOAUTH.
                peer.sendall(b"+PONG\r\n" if known else b"-NOAUTH no\r\n")
            elif known and name == b"REPLCONF":
                peer.sendall(b"+OK\r\n")
            else:
                if known and name == b"PSYNC":
                    self.attempts += 1
                    if self.attempts <= ATTEMPTS:
                        self._send(peer)
                return

    def _send(self, peer: socket.socket) -> None:
        peer.sendall(b"+FULLRESYNC " + secrets.token_hex(20).encode() + b" 0\r\n")
        peer.sendall(b"$%d\r\n" % self._source.stat().st_size)
        with self._source.open("rb") as file:
            while (data := file.read(CHUNK)) and not self._over.is_set():
                peer.sendall(data)
                self.sent += len(data)
        while not self._over.wait(PING_SECONDS / 10):
            peer.sendall(b"*1\r\n$4\r\nPING\r\n")
            peer.settimeout(0.01)
            with contextlib.suppress(TimeoutError):
                if not peer.recv(4096):  # acknowledgements
                    return
            peer.settimeout(PING_SECONDS)


def read_command(lines: Any) -> list[bytes]:
    """Return the words of a command, inline or as an array. Raises ValueError at the end."""
    line = lines.readline(1024).strip()
    if not line:
        raise ValueError("the peer has disconnected")
    words: list[bytes] = []
    if not line.startswith(b"*"):
        words += line.split()
        return words
    for _ in range(min(int(line[1:]), 64)):
        length = int(lines.readline(64).strip()[1:])
        words.append(lines.read(min(length, 4096) + 2)[:-2])
    return words


@contextlib.contextmanager
def replicating(server: Database, source: Path, settings: Settings) -> Iterator[None]:
    """Have a server load an RDB file; yield when it has, while it still is a replica.

    Whatever happens, it is a master again afterwards. The key MARKER is there for as long as the
    server has not dropped its data. Raises ServerUnreachable, CopyCut and TargetCannotReachUs.
    """
    host, port = address_for(server, settings)
    with unreachable(server):
        client = connect(server)
        rdb_version(client, keep=True)
        before = {name: get_config(client, name) for name in ("masteruser", "masterauth")}
    # Behind an advertised address, the connection may arrive at any of ours.
    master = Master(source, "" if settings.advertise else host, port)
    try:
        with unreachable(server):
            set_config(client, {"masteruser": master.user, "masterauth": master.password})
            client.replicaof(host, port or master.port)
        for state in progress(server, master, settings):
            if state.get("master_link_status") == "up" and state["loading"] == "0":
                break
        yield
    except BaseException:
        master.close()
        with contextlib.suppress(Failure):  # the first failure is the one to report
            release(server, before, settings)
        raise
    master.close()
    release(server, before, settings)


def release(server: Database, config: dict[str, str], settings: Settings) -> None:
    """Make the target a master again, once it does not load any more."""
    for state in progress(server, None, settings):
        if state["loading"] == "0":
            break
    with unreachable(server):
        client = connect(server)
        client.replicaof("NO", "ONE")
        set_config(client, config)


def address_for(server: Database, settings: Settings) -> tuple[str, int]:
    """Return the address of this host at which the target connects; port 0 is any free port."""
    if settings.advertise:
        host, _, port = settings.advertise.rpartition(":")
        return host.strip("[]"), int(port)
    there = (server.host, server.port)
    with unreachable(server), socket.create_connection(there, PING_SECONDS) as probe:
        return str(probe.getsockname()[0]), 0


def progress(
    server: Database, master: Master | None, settings: Settings
) -> Iterator[dict[str, str]]:
    """Yield INFO of the target until the caller stops. Raises CopyCut, TargetCannotReachUs."""
    client = connect(server)
    name = title(server)
    log_remedy = "Check its log, its disk and its memory."
    seen: tuple[Any, ...] = ()
    began = since = time.monotonic()
    while True:
        try:
            state = info(client, "replication") | info(client, "persistence")
        except redis.exceptions.RedisError:
            remedy = "Check its log, and start it again."
            raise CopyCut(f"{name} ended while it loaded the data", remedy) from None
        yield state
        sent = master.sent if master else 0
        # The main thread, which gets the signal, puts back what was there.
        if master and process.ending.is_set() and current_thread() is not main_thread():
            raise CopyCut("interrupted", "Run it again.")
        if master and master.attempts > ATTEMPTS:
            what = f"{name} was sent the data {ATTEMPTS} times and did not load it"
            folder = get_config(client, "dir")
            raise CopyCut(what, f"Check its log, and whether it can write to {folder}.")
        fields = ("loading", "loading_loaded_bytes", "async_loading")
        now = (sent, *(state.get(field) for field in fields))
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > settings.stall_seconds:
            if master and not sent:
                remedy = "Set BACKUP_ADVERTISE to an address of this container that it can reach."
                raise TargetCannotReachUs(f"{name} does not connect to this container", remedy)
            raise CopyCut(f"{name} makes no progress in loading the data", log_remedy)
        if time.monotonic() - began > settings.restore_seconds:
            limit = f"within BACKUP_RESTORE_SECONDS={settings.restore_seconds:g}"
            raise CopyCut(f"{name} did not load the data {limit}", log_remedy)
        time.sleep(POLL_SECONDS)


def set_config(client: Any, values: dict[str, str]) -> None:
    """Set configuration parameters of a server."""
    for name, value in values.items():
        client.config_set(name, value)


def ensure_master(server: Database) -> None:
    """Check that a server can become our replica; free one that a killed restore left as replica.

    Raises ServerUnreachable, TargetInUse.
    """
    with unreachable(server):
        client = connect(server)
        if get_config(client, "tls-replication") == "yes":
            remedy = "Run CONFIG SET tls-replication no during the restore, on a trusted network."
            raise TargetInUse(f"{title(server)} replicates over TLS only", remedy)
        state = info(client, "replication")
        if state["role"] == "master":
            return
        if not get_config(client, "masteruser").startswith(USER_PREFIX):
            master = f"{state.get('master_host')}:{state.get('master_port')}"
            remedy = "Restore its master, or run REPLICAOF NO ONE first."
            raise TargetInUse(f"{title(server)} is a replica of {master}", remedy)
        client.replicaof("NO", "ONE")
        set_config(client, {"masteruser": "", "masterauth": ""})
