"""Copy a server as its replica does: an RDB file as of one moment, then the writes after it."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis

from lib.backup import process, rdb
from lib.backup.errors import CopyCut, Failure
from lib.backup.redis_source import (
    connect,
    contents,
    get_config,
    info,
    needed_modules,
    title,
    unreachable,
    versions,
)
from lib.backup.replication import CHUNK, read_command
from lib.backup.settings import Settings
from lib.common.databases import Database

DELAY = "repl-diskless-sync-delay"
POLL_SECONDS = 0.5
FIRST_VALKEY = 9
"""The first that sends another RDB version to a replica that tells its own."""

NO_WRITES = (b"PING", b"SELECT", b"MULTI", b"EXEC", b"REPLCONF")


class Snapshot:
    """A connection that the server takes for a replica of ``version``.

    Without a version, Valkey 9 sends RDB 11, which Valkey 8 and Redis 8 load too.
    """

    def __init__(self, server: Database, settings: Settings, version: str) -> None:
        self._server = server
        self._stall_seconds = settings.stall_seconds
        self._since = time.monotonic()
        self._buffer = b""
        self._taken = 0
        self._connection = connect(server).connection_pool.get_connection()
        for option, value in (("capa", "eof"), ("version", version)):
            with contextlib.suppress(redis.exceptions.ResponseError):
                if value:
                    self._connection.send_command("REPLCONF", option, value)
                    self._connection.read_response()
        # redis-py has no public way to its socket. It has read all replies: nothing is left in it.
        self._socket: Any = self._connection._sock  # noqa: SLF001
        self._socket.settimeout(POLL_SECONDS)

    def close(self) -> None:
        """End the replication."""
        self._connection.disconnect()

    def save(self, target: Path) -> None:
        """Write the RDB file. Raises CopyCut."""
        self._socket.sendall(b"PSYNC ? -1\r\n")
        answer = self._line()
        if not answer.startswith(b"+FULLRESYNC "):
            raise self._cut(answer.decode(errors="replace"))
        self._offset = int(answer.split()[2])
        with target.open("wb") as file:
            file.writelines(self._payload(self._line()))

    def written(self) -> bool:
        """Return whether the server wrote something after the copy, apart from telemetry."""
        self._socket.sendall(b"REPLCONF ACK %d\r\n" % self._offset)  # it waits for that
        with unreachable(self._server):
            end = int(info(connect(self._server), "replication")["master_repl_offset"])
        begin, self._since = self._offset - self._taken, time.monotonic()
        while begin + self._taken < end:
            words = read_command(self)
            if words[0].upper() not in NO_WRITES and not words[1].startswith(b"telemetry{"):
                return True
        return False

    def _payload(self, header: bytes) -> Iterator[bytes]:
        if header.startswith(b"$EOF:"):
            # Without a disk the server does not know the length: 40 random bytes mark the end.
            mark = header.removeprefix(b"$EOF:")
            while not self._buffer.endswith(mark):
                yield self.read(max(len(self._buffer) - len(mark), 0))
                self._receive()
                self._since = time.monotonic()
            yield self.read(len(self._buffer))[: -len(mark)]
            return
        left = int(header[1:])
        while left:
            data = self.read(min(left, max(len(self._buffer), 1)))
            self._since = time.monotonic()
            left -= len(data)
            yield data

    def _line(self) -> bytes:
        # Until the copy begins, the server sends an empty line every second.
        while not (line := self.readline().strip()):
            pass
        return line

    def readline(self, _limit: int = 0) -> bytes:
        """Return the next line."""
        while b"\n" not in self._buffer:
            self._receive()
        return self.read(self._buffer.index(b"\n") + 1)

    def read(self, size: int) -> bytes:
        """Return the next ``size`` bytes."""
        while len(self._buffer) < size:
            self._receive()
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        self._taken += size
        return data

    def _receive(self) -> None:
        while not process.ending.is_set():
            try:
                if data := self._socket.recv(CHUNK):
                    self._buffer += data
                    return
                raise self._cut("the server closed the connection")
            except TimeoutError:
                pass
            except OSError as error:
                raise self._cut(str(error)) from None
            if time.monotonic() - self._since > self._stall_seconds:
                break
        raise self._cut("it stalled")

    def _cut(self, reason: str) -> CopyCut:
        what = f"{title(self._server)}: the copy was cut: {reason}"
        return CopyCut(what, "Check the server's log, and run it again.")


@contextlib.contextmanager
def without_delay(server: Database, settings: Settings) -> Iterator[None]:
    """Have a server start the copy at once, if it allows CONFIG; then put its delay back.

    A file in the working directory keeps the delay: after a kill, the next run puts it back.
    """
    client = connect(server)
    kept = settings.work / f"delay-{server.address}"
    try:
        delay = get_config(client, DELAY)
        if delay not in ("", "0"):
            kept.write_text(delay)
            client.config_set(DELAY, 0)
    except redis.exceptions.ResponseError:
        kept.unlink(missing_ok=True)
    try:
        yield
    finally:
        if kept.exists():
            with contextlib.suppress(redis.exceptions.RedisError):
                client.config_set(DELAY, kept.read_text())
                kept.unlink()


def transfer(server: Database, target: Path, settings: Settings, version: str = "") -> Snapshot:
    """Copy a server to a file. Raises ServerUnreachable, CopyCut."""
    with unreachable(server):
        snapshot = Snapshot(server, settings, version)
    try:
        with without_delay(server, settings):
            snapshot.save(target)
    except BaseException:
        snapshot.close()
        raise
    return snapshot


def copy(server: Database, target: Path, settings: Settings) -> dict[str, Any]:
    """Copy a server to ``target``, check the copy, and return the facts for the manifest.

    ``exact`` is true when nothing was written meanwhile: ``contents`` then describes the copy.
    Raises ServerUnreachable, CopyCut, CopyCorrupt, and OSError for a full disk.
    """
    with unreachable(server):
        about = versions(connect(server))
    try:
        snapshot = transfer(server, target, settings)
    except CopyCut as cut:
        if about["kind"] != "valkey" or int(about["version"].split(".")[0]) < FIRST_VALKEY:
            raise
        # RDB 11 has no place for hash fields that expire.
        try:
            snapshot = transfer(server, target, settings, about["version"])
        except Failure:
            raise cut from None
    with contextlib.closing(snapshot), unreachable(server):
        version = rdb.check(target)
        about["modules"] = needed_modules(server)
        found = contents(server)
        memory = int(info(connect(server), "memory")["used_memory_dataset"])
        exact = False
        with contextlib.suppress(CopyCut):
            exact = not snapshot.written()
    return about | {"rdb": version, "memory": memory, "exact": exact, "contents": found}
