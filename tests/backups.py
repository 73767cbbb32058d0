"""Everything that a backup test needs: FalkorDB, Valkey, OpenCode's state, a fake B2.

The servers are real and listen on loopback.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from tests.fake_b2 import KEY, FakeB2, fake_b2
from tests.servers import redis_server, valkey_server

PROGRAM = Path(__file__).parents[1] / "scripts" / "backup"
SERVER_PASSWORD, ENCRYPTION, DATADOG = "sesam-server-Ää1", "sesam encryption $2", "sesam-datadog-3"
SECRETS = (SERVER_PASSWORD, ENCRYPTION, DATADOG, KEY)
SECONDS = 60
NO_DELAY = ("--repl-diskless-sync-delay", "0", "--loglevel", "warning")
NODES = 300


@dataclass(frozen=True)
class Done:
    """The result of one run of ``backup``."""

    code: int
    stdout: str
    stderr: str

    def ok(self) -> Done:
        assert self.code == 0, self.stdout + self.stderr
        return self

    def failed(self, name: str, *sentences: str) -> Done:
        """Assert that it failed with this error and its exit code, and printed these texts."""
        from lib.backup import errors

        assert f"\n{name}: " in f"\n{self.stderr}", self.stdout + self.stderr
        assert self.code == getattr(errors, name).code
        assert "\n  -> " in self.stderr
        for sentence in sentences:
            assert sentence in self.stderr, self.stderr
        return self

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


@dataclass
class World:
    """The servers, by their ports, and the environment of ``backup``."""

    home: Path
    b2: FakeB2
    falkordb: int
    valkey: int
    environ: dict[str, str]

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        """Start ``backup`` with these arguments; ``env`` overrides its environment."""
        base = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(self.home)}
        return subprocess.Popen(
            [sys.executable, "-IB", str(PROGRAM), *words],
            env=base | self.environ | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, child: subprocess.Popen[str]) -> Done:
        """Wait for ``backup`` to end; assert that it printed no secret and left no file."""
        try:
            stdout, stderr = child.communicate(timeout=SECONDS)
        finally:
            child.kill()
            child.wait()
        for secret in SECRETS:
            assert secret not in stdout + stderr
        assert "Traceback" not in stderr, stderr
        # A run removes its own files and those of a killed run before it, unless it is killed too.
        words = list(child.args)  # type: ignore[arg-type]
        if child.returncode != -signal.SIGKILL and ("run" in words or "restore" in words):
            assert self.leftovers() == set()
        return Done(child.returncode, stdout, stderr)

    def backup(self, *words: str, **env: str) -> Done:
        return self.end(self.start(*words, **env))

    def leftovers(self) -> set[str]:
        """Return the files in the working directory that no run may leave."""
        if not self.work.exists():
            return set()
        return {path.name for path in self.work.iterdir()} - {"lock", "last.json"}

    def run(self, *words: str, **env: str) -> str:
        """Make a backup and return its ID."""
        return str(self.backup("run", "--json", *words, **env).ok().json["id"])

    def ids(self) -> list[str]:
        """Return the IDs of the complete backups, newest first."""
        return [each["id"] for each in self.backup("list", "--json").ok().json if not each["fault"]]

    @property
    def work(self) -> Path:
        return Path(self.environ["BACKUP_WORK_DIR"])

    @property
    def database(self) -> Path:
        return self.home / ".local/share/opencode/opencode.db"

    @property
    def auth(self) -> Path:
        return self.home / ".local/share/opencode/auth.json"

    def graph(self, query: str, name: str = "memory", port: int = 0) -> Any:
        """Return the rows of a Cypher query; without RETURN there are none."""
        with client(port or self.falkordb) as server:
            reply = server.execute_command("GRAPH.QUERY", name, query)
            return reply[1] if len(reply) > 1 else []

    def nodes(self, port: int = 0) -> int:
        """Return the number of nodes that ``fill`` has created."""
        with client(port or self.falkordb) as server:
            if b"memory" not in server.execute_command("GRAPH.LIST"):
                return 0
        return int(self.graph("MATCH (n:Node) RETURN count(n)", port=port)[0][0])

    def rows(self) -> int:
        with contextlib.closing(sqlite3.connect(self.database)) as database:
            return int(database.execute("SELECT count(*) FROM session").fetchone()[0])

    def fill(self) -> None:
        """Create data of every kind in all parts."""
        leaves = "CREATE (:Node {i: i, name: 'n' + i})-[:Knows {w: i}]->(:Leaf {f: i / 4.0})"
        self.graph(f"UNWIND range(1, {NODES}) AS i {leaves}")
        self.graph("CREATE INDEX FOR (n:Node) ON (n.i)")
        self.graph("CREATE (:Node {v: vecf32([0.5, 0.25])})", name="other")
        with client(self.valkey) as server:
            for i in range(50):
                server.set(f"key{i}", "x" * i)
            server.rpush("list", "a", "b")
            server.sadd("set", *range(300))
            server.hset("hash", mapping={f"f{i}": i for i in range(300)})
            server.zadd("scores", {"a": 1.5, "b": -2})
            server.xadd("stream", {"event": "1"})
            server.set("session", "soon gone", ex=3600)
            server.execute_command("SELECT", 3)
            server.set("elsewhere", "1")
        self.auth.parent.mkdir(parents=True, exist_ok=True)
        self.auth.write_text('{"provider": {"key": "k"}}')
        self.auth.chmod(0o600)
        with contextlib.closing(sqlite3.connect(self.database)) as database:
            database.execute("PRAGMA journal_mode = wal")
            database.execute("CREATE TABLE session (id INTEGER PRIMARY KEY, data TEXT)")
            database.executemany("INSERT INTO session (data) VALUES (?)", [("d" * 500,)] * 200)
            database.commit()

    def lose(self) -> None:
        """Delete all data."""
        for port in (self.falkordb, self.valkey):
            with client(port) as server:
                server.flushall()
        for path in self.auth.parent.iterdir():
            path.unlink()

    def whole(self) -> None:
        """Assert that all data that ``fill`` created is there."""
        assert self.nodes() == NODES
        [[total]] = self.graph("MATCH ()-[e:Knows]->() RETURN sum(e.w)")
        assert float(total) == NODES * (NODES + 1) / 2
        assert len(self.graph("CALL db.indexes() YIELD label")) == 1
        with client(self.valkey) as server:
            assert server.dbsize() == 56
            assert server.get("key49") == b"x" * 49
            assert len(server.smembers("set")) == 300
            assert server.zscore("scores", "b") == -2
            assert 0 < server.ttl("session") <= 3600
            assert server.info("replication")["role"] == "master"
            assert server.config_get("master*") == {"masteruser": "", "masterauth": ""}
            server.execute_command("SELECT", 3)
            assert server.get("elsewhere") == b"1"
        assert self.rows() == 200
        assert self.auth.read_text() == '{"provider": {"key": "k"}}'
        assert self.auth.stat().st_mode & 0o777 == 0o600


@contextlib.contextmanager
def client(port: int) -> Iterator[Any]:
    """Yield a client of a server, on a single connection, so that SELECT lasts."""
    server = redis.Redis(
        host="127.0.0.1",
        port=port,
        password=SERVER_PASSWORD,
        socket_timeout=SECONDS,
        single_connection_client=True,
    )
    with contextlib.closing(server):
        yield server


@contextlib.contextmanager
def world(home: Path) -> Iterator[World]:
    """Run all servers and fill them with data."""
    with (
        fake_b2("bucket") as b2,
        redis_server(*NO_DELAY, graph=True, password=SERVER_PASSWORD) as falkordb,
        valkey_server(*NO_DELAY, password=SERVER_PASSWORD) as valkey,
    ):
        environ = {
            "BACKUP_REMOTE": "b2:bucket/backups",
            "BACKUP_WORK_DIR": str(home / "work"),
            "BACKUP_STALL_SECONDS": "20",
            "FALKORDB_HOST": "127.0.0.1",
            "FALKORDB_PORT": str(falkordb),
            "FALKORDB_PASSWORD": SERVER_PASSWORD,
            "VALKEY_HOST": "127.0.0.1",
            "VALKEY_PORT": str(valkey),
            "VALKEY_PASSWORD": SERVER_PASSWORD,
            **b2.environ,
        }
        here = World(home, b2, falkordb, valkey, environ)
        here.fill()
        yield here


@contextlib.contextmanager
def repeatedly(work: Callable[[], object]) -> Iterator[None]:
    """Call ``work`` in a loop in a thread during the block; re-raise its exception at the end."""
    over = threading.Event()

    def loop() -> None:
        while not over.is_set():
            work()

    with ThreadPoolExecutor(1) as pool:
        thread = pool.submit(loop)
        try:
            yield
        finally:
            over.set()
    thread.result()
