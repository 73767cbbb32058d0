"""Restore over the network: for as long as it takes, be the master that the target replicates from.

The target replaces everything that it holds with what it is sent. An RDB that it cannot load ends it, so whoever calls
this has looked at the RDB and at the target before.
"""

import contextlib
import hmac
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import redis

from backup_lib import servers
from backup_lib.errors import CopyCut, Failure, NotConfigured, TargetCannotReachUs, TargetInUse
from backup_lib.settings import Place, Settings

MARK = "opencode-restore-"
"""The target signs in to us as a user of such a name: so a later restore knows what an earlier one left behind."""
PING_SECONDS = 5
POLL_SECONDS = 0.05


class Master:
    """A listener that sends one RDB to whoever signs in, and then only pings."""

    def __init__(self, source: Path, host: str, port: int) -> None:
        self.user, self.password = MARK + secrets.token_hex(8), secrets.token_hex(32)
        self.sent = 0
        self._source = source
        self._over = threading.Event()
        self._listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._listener.settimeout(0.1)
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, whatever is under way."""
        self._over.set()
        self._thread.join(10)
        self._listener.close()

    def _serve(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(OSError, ValueError):  # whoever calls wrongly, or goes away, may call again
                peer, _ = self._listener.accept()
                peer.settimeout(PING_SECONDS)
                with peer, peer.makefile("rb") as lines:
                    self._answer(peer, lines)

    def _answer(self, peer: socket.socket, lines: IO[bytes]) -> None:
        known = False
        while not self._over.is_set():
            words = _command(lines)
            name = words[0].upper() if words else b""
            if name == b"AUTH":
                told = b" ".join(words[1:])
                known = hmac.compare_digest(told, f"{self.user} {self.password}".encode())
                peer.sendall(b"+OK\r\n" if known else b"-WRONGPASS no\r\n")
            elif not known and name == b"PING":
                peer.sendall(b"-NOAUTH no\r\n")  # a replica asks this first, and goes on when it hears so
            elif not known or name not in (b"PING", b"REPLCONF", b"PSYNC"):
                return
            elif name == b"PSYNC":
                self._send(peer)
                return
            else:
                peer.sendall(b"+PONG\r\n" if name == b"PING" else b"+OK\r\n")

    def _send(self, peer: socket.socket) -> None:
        peer.sendall(b"+FULLRESYNC " + secrets.token_hex(20).encode() + b" 0\r\n")
        peer.sendall(b"$%d\r\n" % self._source.stat().st_size)
        with self._source.open("rb") as file:
            while (data := file.read(1 << 18)) and not self._over.is_set():
                peer.sendall(data)
                self.sent += len(data)
        while not self._over.wait(PING_SECONDS / 10):
            peer.sendall(b"*1\r\n$4\r\nPING\r\n")
            peer.settimeout(0.01)
            with contextlib.suppress(TimeoutError):
                if not peer.recv(4096):  # acknowledgements, which nobody needs
                    return
            peer.settimeout(PING_SECONDS)


def _command(lines: IO[bytes]) -> list[bytes]:
    line = lines.readline(1024).strip()
    if not line.startswith(b"*"):
        if not line:
            raise ValueError("the peer has gone")
        return line.split()
    words = []
    for _ in range(min(int(line[1:]), 64)):
        length = int(lines.readline(64).strip()[1:])
        words.append(lines.read(min(length, 4096) + 2)[:-2])
    return words


@contextlib.contextmanager
def replicating(place: Place, source: Path, settings: Settings) -> Iterator[None]:
    """Have a server load an RDB; yield when it has, still a replica; whatever happens, it is a master afterwards.

    Raises CopyCut when it stops half-way or ends, and what ``servers.named`` raises.
    """
    with servers.named(place):
        client = servers.connect(place)
        kept = {name: _config(client, name) for name in ("masteruser", "masterauth")}
    host, port = _our_address(place, settings)
    # When somebody else's name is advertised, we cannot know at which of our addresses its connections arrive.
    master = Master(source, "" if settings.advertise else host, port)
    try:
        with servers.named(place):
            _configure(client, {"masteruser": master.user, "masterauth": master.password})
            client.execute_command("REPLICAOF", host, port or master.port)
        _wait(place, master, settings.stall_seconds)
        yield
    except BaseException:
        master.close()
        with contextlib.suppress(Failure):  # what went wrong first is what is told
            _free(place, kept, settings.stall_seconds)
        raise
    else:
        master.close()
        _free(place, kept, settings.stall_seconds)


def _free(place: Place, kept: dict[str, str], stall_seconds: float) -> None:
    """Make the target a master again; while it loads what it has been sent, it can do nothing else."""
    for told in _progress(place, None, stall_seconds):
        if told["loading"] == "0":
            break
    with servers.named(place):
        client = servers.connect(place)
        client.execute_command("REPLICAOF", "NO", "ONE")
        _configure(client, kept)


def _our_address(place: Place, settings: Settings) -> tuple[str, int]:
    """Return where the target finds us; port 0 is a free one."""
    if settings.advertise:
        host, _, port = settings.advertise.rpartition(":")
        if not host or not port.isdigit():
            raise NotConfigured("BACKUP_ADVERTISE is not HOST:PORT", "Write it as in 192.0.2.7:7000.")
        return host.strip("[]"), int(port)
    with servers.named(place), socket.create_connection((place.host, place.port), 5) as probe:
        return str(probe.getsockname()[0]), 0


def _wait(place: Place, master: Master, stall_seconds: float) -> None:
    for told in _progress(place, master, stall_seconds):
        if told.get("master_link_status") == "up" and told["loading"] == "0":
            return


def _progress(place: Place, master: Master | None, stall_seconds: float) -> Iterator[dict[str, str]]:
    """Yield what the target says of its loading, until it makes no progress any more. Raises Failure."""
    client = servers.connect(place)
    seen: tuple[Any, ...] = ()
    since = time.monotonic()
    while True:
        try:
            told = servers.info(client, "replication") | servers.info(client, "persistence")
        except redis.exceptions.RedisError:
            raise CopyCut(f"{place} ended while it loaded the data", "Look at its log and start it again.") from None
        yield told
        sent = master.sent if master else 0
        now = (sent, told["loading"], told.get("loading_loaded_bytes"), told.get("async_loading"))
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > stall_seconds:
            if master and not sent:
                remedy = "It must be able to connect to us: set BACKUP_ADVERTISE to an address of ours that it reaches."
                raise TargetCannotReachUs(f"{place} has fetched nothing from us", remedy)
            raise CopyCut(f"{place} makes no progress in loading the data", "Look at its log.")
        time.sleep(POLL_SECONDS)


def _config(client: Any, name: str) -> str:
    reply = client.execute_command("CONFIG", "GET", name)
    pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    return "".join(servers.text(value or "") for _, value in pairs)


def _configure(client: Any, values: dict[str, str]) -> None:
    for name, value in values.items():
        client.execute_command("CONFIG", "SET", name, value)


def ready(place: Place) -> None:
    """See that a server is a master that can be a replica of ours; free it when a killed restore has left it as one.

    Raises TargetInUse.
    """
    with servers.named(place):
        client = servers.connect(place)
        if _config(client, "tls-replication") == "yes":
            remedy = "Set tls-replication to no while you restore, over a network that you trust."
            raise TargetInUse(f"{place} replicates over TLS only", remedy)
        told = servers.info(client, "replication")
        if told["role"] == "master":
            return
        if not _config(client, "masteruser").startswith(MARK):
            master = f"{told.get('master_host')}:{told.get('master_port')}"
            raise TargetInUse(f"{place} is a replica of {master}", "Restore its master, or REPLICAOF NO ONE first.")
        client.execute_command("REPLICAOF", "NO", "ONE")
        _configure(client, {"masteruser": "", "masterauth": ""})
