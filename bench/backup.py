"""Back up, lose and restore data on servers of its own: as a drill, and as a benchmark."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.ratio import Ratio
from pipeline.core import process
from pipeline.core.console import log, ok
from pipeline.core.dev_tools import ensure_dev_tools
from pipeline.core.errors import ChecksFailed, ToolMissing
from pipeline.core.settings import ROOT

BATCH = 10_000
"""Nodes and keys that are written by one request."""

FILL = """
UNWIND range($first, $last) AS i
CREATE (:Person {i: i, name: 'n' + i})-[:Knows {w: i}]->(:Leaf)
"""


def check_tools() -> None:
    """Install the development tools. Raises ToolMissing for a program that apt has to install."""
    ensure_dev_tools()
    for program in ("rclone", "redis-cli"):
        if not shutil.which(program):
            raise ToolMissing(f"{program} is not installed", "Run: inv setup --tests")


def connect(port: int) -> Any:
    """Return a client of the Redis or FalkorDB at ``port``."""
    import redis

    return redis.Redis(host="127.0.0.1", port=port, socket_timeout=60)


def fill_databases(falkordb: int, valkey: int, count: int) -> None:
    """Write ``count`` pairs of nodes with an edge, and ``count`` keys."""
    graph, keys = connect(falkordb), connect(valkey)
    for first in range(0, count, BATCH):
        last = min(first + BATCH, count) - 1
        query = f"CYPHER first={first} last={last} {FILL}"
        graph.execute_command("GRAPH.QUERY", "memory", query)
        keys.mset({f"key:{i}": value_of(i) for i in range(first, last + 1)})


def value_of(number: int) -> str:
    """Return the value of a key."""
    return f"value {number} " * 5


def fill_state(database: Path, count: int) -> None:
    """Create OpenCode's database with ``count`` rows."""
    database.parent.mkdir(parents=True)
    (database.parent / "auth.json").write_text("{}")
    with contextlib.closing(sqlite3.connect(database)) as state:
        state.execute("PRAGMA journal_mode = wal")
        state.execute("CREATE TABLE session (id INTEGER PRIMARY KEY, data TEXT)")
        rows = [["d" * 200]] * count
        state.executemany("INSERT INTO session (data) VALUES (?)", rows)
        state.commit()


def run_backup(scratch: Path, falkordb: int, valkey: int, *words: str) -> float:
    """Run the backup command with a directory as its remote; return its seconds."""
    env = {
        "HOME": str(scratch / "home"),
        "BACKUP_REMOTE": str(scratch / "remote"),
        "BACKUP_WORK_DIR": str(scratch / "work"),
        "BACKUP_PASSWORD": "drill",
        "FALKORDB_HOST": "127.0.0.1",
        "FALKORDB_PORT": str(falkordb),
        "VALKEY_HOST": "127.0.0.1",
        "VALKEY_PORT": str(valkey),
    }
    program = str(ROOT / "scripts" / "backup")
    result = process.run(
        [
            sys.executable,
            "-IB",
            program,
            *words,
        ],
        env=env,
    )
    if result.ok:
        return result.seconds
    what = f"backup {words[0]} exited with {result.code}"
    raise ChecksFailed(
        what,
        "docs/backup.md lists its exit codes.",
        result.output,
    )


def drill(count: int) -> dict[str, float]:
    """Fill servers, back them up, lose everything, restore onto new servers and compare.

    Return the seconds of each step. Raises ChecksFailed if something does not come back.
    """
    check_tools()
    from tests.servers import redis_server, valkey_server

    took: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        scratch = Path(directory)
        database = scratch / "home/.local/share/opencode/opencode.db"
        with redis_server(graph=True) as falkordb, valkey_server() as valkey:
            log(f"drill: writing {count:,} pairs of nodes, keys and rows")
            fill_databases(falkordb, valkey, count)
            fill_state(database, count)
            took["backup"] = run_backup(scratch, falkordb, valkey, "run", "--create")
        ok(f"backup    {took['backup']:6.2f} s  copied, checked, encrypted, uploaded, read back")
        began = time.monotonic()
        shutil.rmtree(scratch / "home")
        with redis_server(graph=True) as falkordb, valkey_server() as valkey:
            took["loss"] = time.monotonic() - began
            ok(f"loss      {took['loss']:6.2f} s  files removed; new, empty servers started")
            took["restore"] = run_backup(scratch, falkordb, valkey, "restore")
            ok(f"restore   {took['restore']:6.2f} s  downloaded, checked, restored, compared")
            began = time.monotonic()
            found = compare(falkordb, valkey, database, count)
            took["compare"] = time.monotonic() - began
            ok(f"compare   {took['compare']:6.2f} s  {found}: all of it")
    return took


def compare(falkordb: int, valkey: int, database: Path, count: int) -> str:
    """Return what was restored, in words. Raises ChecksFailed if it is not what was written."""
    query = "MATCH (n) RETURN count(n)"
    answer = connect(falkordb).execute_command("GRAPH.QUERY", "memory", query)
    nodes = answer[1][0][0]
    keys = connect(valkey)
    with contextlib.closing(sqlite3.connect(database)) as state:
        rows = state.execute("SELECT count(*) FROM session").fetchone()[0]
    found = f"{nodes:,} nodes, {keys.dbsize():,} keys, {rows:,} rows"
    wanted = f"{2 * count:,} nodes, {count:,} keys, {count:,} rows"
    last = keys.get(f"key:{count - 1}")
    if found != wanted or last != value_of(count - 1).encode():
        raise ChecksFailed(
            f"restored {found} of {wanted}; the last value is {last!r}", "Report this as a bug."
        )
    return found


def bench(count: int = 100_000) -> list[Ratio]:
    """Compare a backup with ``redis-cli --rdb``, and a restore with a restart from those files."""
    check_tools()
    from tests.servers import redis_server, valkey_server

    only = ("--only", "falkordb,valkey")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        scratch = Path(directory)
        homes = [scratch / "falkordb", scratch / "valkey"]
        with redis_server(graph=True) as falkordb, valkey_server() as valkey:
            fill_databases(falkordb, valkey, count)
            began = time.monotonic()
            copies, quiet = [], subprocess.DEVNULL
            for home, port in zip(homes, (falkordb, valkey), strict=True):
                home.mkdir()
                argv = [
                    "redis-cli",
                    "-p",
                    str(port),
                    "--rdb",
                    str(home / "dump.rdb"),
                ]
                copies.append(subprocess.Popen(argv, stdout=quiet, stderr=quiet))
            for copy in copies:
                copy.wait()
            copied = time.monotonic() - began
            backed_up = run_backup(scratch, falkordb, valkey, "run", "--create", *only)
        began = time.monotonic()
        with (
            redis_server("--dir", str(homes[0]), graph=True),
            valkey_server("--dir", str(homes[1])) as valkey,
        ):
            restarted = time.monotonic() - began
            loaded = connect(valkey).dbsize()
        if loaded != count:
            raise ChecksFailed(f"a restarted server has {loaded} keys", "Report this as a bug.")
        with redis_server(graph=True) as falkordb, valkey_server() as valkey:
            restored = run_backup(scratch, falkordb, valkey, "restore", *only)
    size = f"{2 * count:,} nodes and {count:,} keys"
    dump = "redis-cli --rdb of both, side by side"
    load = "both servers restarting from those RDBs"
    return [
        Ratio(
            f"backup of {size}",
            dump,
            "s",
            backed_up,
            copied,
            0.6,
        ),
        Ratio(
            "restore of the same",
            load,
            "s",
            restored,
            restarted,
            3.0,
        ),
    ]
