"""FalkorDB and Valkey: connect, describe the content, and copy it with ``redis-cli --rdb``."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
from redis.backoff import ConstantBackoff
from redis.exceptions import ConnectionError  # noqa: A004
from redis.retry import Retry

from lib.backup import process, rdb
from lib.backup.errors import CopyCut, ServerUnreachable, full_disk
from lib.backup.settings import Settings
from lib.common.databases import Database

SECONDS = 30
RETRIES = 6
RETRY_SECONDS = 0.5
SCAN_COUNT = 1000
FULL_BYTES = 1 << 16

# Digests of keys, computed in the server: a few milliseconds for a hundred keys. Members of sets
# and hashes have no
# order, so their hashes are added up. A key that expires is only counted, since it may be gone when
# the content is
# compared; so is the content of a key that would block the server. FalkorDB writes telemetry{...}
# at each query, and
# graphmeta exists only while a graph is being saved.
DIGESTS = """
local function h(s) return tonumber(string.sub(redis.sha1hex(s), 1, 12), 16) end
local many, long = 1000, 65536
local function value(t, key)
    local n = 0
    if t == 'string' then
        n = redis.call('STRLEN', key)
        return n > long and n or h(redis.call('GET', key))
    elseif t == 'list' then
        n = redis.call('LLEN', key)
        if n > many then return n end
        for i, x in ipairs(redis.call('LRANGE', key, 0, -1)) do n = n + h(i .. ':' .. x) end
    elseif t == 'set' then
        n = redis.call('SCARD', key)
        if n > many then return n end
        for _, x in ipairs(redis.call('SMEMBERS', key)) do n = n + h(x) end
    elseif t == 'hash' or t == 'zset' then
        n = redis.call(t == 'hash' and 'HLEN' or 'ZCARD', key)
        if n > many then return n end
        local flat = t == 'hash' and redis.call('HGETALL', key)
            or redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
        for i = 1, #flat, 2 do n = n + h(#flat[i] .. ':' .. flat[i] .. flat[i + 1]) end
    elseif t == 'stream' then
        n = redis.call('XLEN', key)
        if n > many then return n end
        for _, x in ipairs(redis.call('XRANGE', key, '-', '+')) do
            n = n + h(x[1] .. cjson.encode(x[2]))
        end
    end
    return n % 281474976710656
end
local scanned = redis.call('SCAN', ARGV[1], 'COUNT', 100)
local found, expiring = {}, {}
for _, key in ipairs(scanned[2]) do
    local t = redis.call('TYPE', key).ok
    if string.sub(key, 1, 10) ~= 'telemetry{' and t ~= 'graphmeta' then
        if redis.call('PTTL', key) >= 0 then
            expiring[#expiring + 1] = string.sub(redis.sha1hex(key), 1, 12)
        else
            local all = #key .. ':' .. key .. t .. value(t, key)
            found[#found + 1] = string.sub(redis.sha1hex(all), 1, 12)
        end
    end
end
return {scanned[1], found, expiring}
"""

MARKER = "opencode-restore-marker"
PROBE = """#!lua flags=allow-oom
redis.call('SET', KEYS[1], 'x')
local dumped = redis.call('DUMP', KEYS[1])
if ARGV[1] == '' then redis.call('DEL', KEYS[1]) end
return dumped
"""


@contextlib.contextmanager
def unreachable(server: Database) -> Iterator[None]:
    """Raise ServerUnreachable for redis-py's errors; their texts may quote secrets."""
    name = server.name
    try:
        yield
    except redis.exceptions.AuthenticationError:
        reason = f"rejects {name}_PASSWORD, or requires one"
    except redis.exceptions.BusyLoadingError:
        reason = "is loading its data"
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError) as error:
        reason = f"does not answer ({type(error).__name__})"
    except redis.exceptions.ResponseError as error:
        reason = f"refuses a command ({str(error).split(' ', 1)[0]})"
    else:
        return
    remedy = f"Check that it runs, and {name}_HOST, {name}_PORT and {name}_PASSWORD."
    raise ServerUnreachable(f"{title(server)} {reason}", remedy)


def title(server: Database) -> str:
    """Return the server as messages name it: ``valkey at HOST:PORT``."""
    return f"{server.name.lower()} at {server.address}"


def connect(server: Database, database: int = 0) -> Any:
    """Return a client whose replies are bytes; it waits for a server that is restarting."""
    retry = Retry(ConstantBackoff(RETRY_SECONDS), RETRIES, (ConnectionError,))
    return server.client(SECONDS, db=database, decode_responses=False, retry=retry)


def text(value: Any) -> str:
    """Return a reply as str."""
    return value.decode() if isinstance(value, bytes) else str(value)


def info(client: Any, section: str) -> dict[str, str]:
    """Return a section of INFO."""
    reply = client.execute_command("INFO", section)
    return {str(name): str(value) for name, value in reply.items()}


def versions(client: Any) -> dict[str, Any]:
    """Return ``{kind, version, modules: {name: number}}``; kind is valkey or redis."""
    server = info(client, "server")
    kind = "valkey" if "valkey_version" in server else "redis"
    modules = {}
    for row in client.module_list():
        fields = {text(name): value for name, value in row.items()}
        modules[text(fields["name"])] = int(fields["ver"])
    return {"kind": kind, "version": server[f"{kind}_version"], "modules": modules}


def key_counts(client: Any) -> dict[int, int]:
    """Return how many keys each database that is not empty has."""
    counts = {}
    for name, values in client.info("keyspace").items():
        counts[int(name.removeprefix("db"))] = int(values["keys"])
    return counts


def rdb_version(client: Any, *, keep: bool = False) -> int:
    """Return the newest RDB version that a server reads: the one at the end of its DUMP.

    It sets the key MARKER, and removes it, also one from before, unless ``keep`` is set.
    """
    dumped = client.eval(PROBE, 1, MARKER, "keep" if keep else "")
    return int.from_bytes(dumped[-10:-8], "little")


def holds_data(server: Database) -> bool:
    """Return whether there is any key, apart from FalkorDB's telemetry."""
    for number in sorted(key_counts(connect(server))):
        for key in connect(server, number).scan_iter(count=SCAN_COUNT):
            if not key.startswith(b"telemetry{"):
                return True
    return False


def contents(server: Database) -> dict[str, Any]:
    """Return the content: key counts and a digest for each database, counts for each graph.

    If it is the same before and after a copy, it also describes the copy.
    """
    client = connect(server)
    found: dict[str, Any] = {"databases": {}, "graphs": {}}
    for number in sorted(key_counts(client)):
        if database := database_contents(connect(server, number)):
            found["databases"][str(number)] = database
    if "graph" in versions(client)["modules"]:
        for name in sorted(client.execute_command("GRAPH.LIST")):
            found["graphs"][text(name)] = graph_contents(client, name)
    return found


def database_contents(client: Any) -> dict[str, Any]:
    """Return ``{keys, expiring, digest}`` of one database; empty without keys."""
    cursor: Any = 0
    lasting: set[bytes] = set()
    expiring: set[bytes] = set()
    while True:
        cursor, digests, volatile = client.eval(DIGESTS, 0, cursor)
        lasting.update(digests)  # sets, since SCAN may return a key twice
        expiring.update(volatile)
        if int(cursor) == 0:
            break
    if not lasting and not expiring:
        return {}
    total = sum(int(digest, 16) for digest in lasting) % (1 << 64)
    return {"keys": len(lasting), "expiring": len(expiring), "digest": f"{total:016x}"}


def graph_contents(client: Any, name: bytes) -> dict[str, Any]:
    """Return the counts of a graph: nodes, edges, indexes, nodes by label, edges by type."""

    def rows(query: str) -> list[Any]:
        return list(client.execute_command("GRAPH.RO_QUERY", name, query)[1])

    def counts(query: str) -> dict[str, int]:
        return {text(key): count for key, count in sorted(rows(query))}

    return {
        "nodes": rows("MATCH (n) RETURN count(n)")[0][0],
        "edges": rows("MATCH ()-[e]->() RETURN count(e)")[0][0],
        "labels": counts("MATCH (n) UNWIND labels(n) AS label RETURN label, count(n)"),
        "types": counts("MATCH ()-[e]->() RETURN type(e), count(e)"),
        "indexes": len(rows("CALL db.indexes() YIELD label RETURN label")),
    }


def copy(server: Database, target: Path, settings: Settings) -> dict[str, Any]:
    """Copy a server's data to ``target``, check it, and return the facts for the manifest.

    ``exact`` is true when nothing was written during the copy: ``contents`` then describes it.
    Raises ServerUnreachable, CopyCut, CopyCorrupt and DiskFull.
    """
    with unreachable(server):
        client = connect(server)
        about = versions(client)
        before = contents(server)
        dump(server, target, settings)
        version = rdb.check(target)
        after = contents(server)
        memory = int(info(client, "memory")["used_memory_dataset"])
    return about | {
        "rdb": version,
        "memory": memory,
        "exact": before == after,
        "contents": after,
    }


def dump_argv(server: Database, target: Path) -> list[str]:
    """Return the command that copies a server to a file; its password comes by REDISCLI_AUTH."""
    argv = [
        "redis-cli",
        "-h",
        server.host,
        "-p",
        str(server.port),
        "--no-auth-warning",
    ]
    if server.username:
        argv += ["--user", server.username]
    if server.tls:
        argv.append("--tls")
    return [*argv, "--rdb", str(target)]


def dump(server: Database, target: Path, settings: Settings) -> None:
    """Copy a server to a file, as of one moment. Raises CopyCut and DiskFull.

    When the connection is cut, redis-cli leaves a part of the file and exits with 1.
    """
    environ = {
        name: value for name, value in settings.environ.items() if not name.startswith("RCLONE_")
    }
    if server.password:
        environ["REDISCLI_AUTH"] = server.password
    done = process.run(
        dump_argv(server, target),
        environ,
        progress=lambda: target.stat().st_size if target.exists() else 0,
        stall_seconds=settings.stall_seconds,
    )
    if not done.code:
        return
    output = settings.hide(done.stderr + done.stdout.decode(errors="replace"))
    reason = "it stalled" if done.code == -signal.SIGKILL else " / ".join(output.splitlines())
    disk = os.statvfs(target.parent)
    if "No space left" in reason or disk.f_bavail * disk.f_frsize < FULL_BYTES:
        raise full_disk(str(target.parent))
    remedy = "Check the server's log, and run it again."
    raise CopyCut(f"{title(server)}: the copy was cut: {reason[-300:]}", remedy)
