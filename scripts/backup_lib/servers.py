"""FalkorDB and Valkey: connect, copy by ``redis-cli --rdb``, and say what is in there."""

import contextlib
import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from backup_lib import children, rdb
from backup_lib.errors import CopyCut, ServerUnreachable, full_disk
from backup_lib.settings import Place, Settings

SECONDS = 30
SAMPLE = 1000
"""Of a graph's nodes, and of its edges, at most so many are read to compare content."""

# Digests of keys, computed where they are: a few milliseconds for a hundred keys, and nothing to transfer. Members of
# sets and hashes have no order, so sums of hashes are taken. A key that expires is only counted, as it may be gone by
# the time of the comparison; so is the inside of a key that would keep the server busy. FalkorDB's telemetry{...} is
# written by asking it anything, and graphmeta is there only while a graph is being saved.
DIGESTS = """
local function h(s) return tonumber(string.sub(redis.sha1hex(s), 1, 12), 16) end
local many, long = 10000, 1048576
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
        local flat = t == 'hash' and redis.call('HGETALL', key) or redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
        for i = 1, #flat, 2 do n = n + h(#flat[i] .. ':' .. flat[i] .. flat[i + 1]) end
    elseif t == 'stream' then
        n = redis.call('XLEN', key)
        if n > many then return n end
        for _, x in ipairs(redis.call('XRANGE', key, '-', '+')) do n = n + h(x[1] .. cjson.encode(x[2])) end
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
            found[#found + 1] = string.sub(redis.sha1hex(#key .. ':' .. key .. t .. value(t, key)), 1, 12)
        end
    end
end
return {scanned[1], found, expiring}
"""


@contextlib.contextmanager
def named(place: Place) -> Iterator[None]:
    """Raise ServerUnreachable for what redis-py raises; its messages may quote a command, so only kinds are told."""
    remedy = f"Look whether it runs, and at {place.part.upper()}_HOST, _PORT and _PASSWORD."
    try:
        yield
    except redis.exceptions.AuthenticationError:
        raise ServerUnreachable(f"{place} does not accept the password, or asks for one", remedy) from None
    except redis.exceptions.BusyLoadingError:
        raise ServerUnreachable(f"{place} is loading its data", "Wait until it has, and try again.") from None
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError) as error:
        raise ServerUnreachable(f"{place} does not answer ({type(error).__name__})", remedy) from None
    except redis.exceptions.ResponseError as error:
        word = str(error).split(" ", 1)[0]
        if word == "NOAUTH":
            raise ServerUnreachable(f"{place} asks for a password", remedy) from None
        raise ServerUnreachable(f"{place} refuses what a backup needs ({word})", remedy) from None


def connect(place: Place, database: int = 0) -> Any:
    """Return a client; replies are bytes."""
    return redis.Redis(
        host=place.host,
        port=place.port,
        db=database,
        username=place.username or None,
        password=place.password or None,
        ssl=place.tls,
        socket_timeout=SECONDS,
        socket_connect_timeout=5,
        retry=Retry(NoBackoff(), 1),
    )


def info(client: Any, section: str) -> dict[str, str]:
    """Return a section of INFO."""
    return {str(name): str(value) for name, value in client.execute_command("INFO", section).items()}


def versions(client: Any) -> dict[str, Any]:
    """Return ``{kind, version, modules: {name: number}}``."""
    told = info(client, "server")
    kind = "valkey" if "valkey_version" in told else "redis"
    modules = {}
    for row in client.execute_command("MODULE", "LIST"):
        pairs = row.items() if isinstance(row, dict) else zip(row[::2], row[1::2], strict=True)
        each = {text(name): value for name, value in pairs}
        modules[text(each["name"])] = int(each["ver"])
    return {"kind": kind, "version": told[f"{kind}_version"], "modules": modules}


def text(value: Any) -> str:
    """Return a reply as text."""
    return value.decode() if isinstance(value, bytes) else str(value)


def keys(client: Any) -> dict[int, int]:
    """Return how many keys each database has that has any, telemetry and what has expired among them."""
    replies = client.execute_command("INFO", "keyspace").items()
    return {int(name[2:]): int(said["keys"]) for name, said in replies if name.startswith("db")}


PROBE = """#!lua flags=allow-oom
redis.call('SET', KEYS[1], 'x', 'EX', 60)
local dumped = redis.call('DUMP', KEYS[1])
redis.call('DEL', KEYS[1])
return dumped
"""


def rdb_version(client: Any) -> int:
    """Return the newest RDB that a server reads, which is the one that it writes: it is at the end of each DUMP."""
    dumped = client.eval(PROBE, 1, "opencode-restore-probe")
    return int.from_bytes(dumped[-10:-8], "little")


def holds_something(place: Place) -> bool:
    """Say whether there is any key but FalkorDB's own telemetry."""
    with named(place):
        for number in sorted(keys(connect(place))):
            client = connect(place, number)
            if any(not key.startswith(b"telemetry{") for key in client.scan_iter(count=SAMPLE)):
                return True
    return False


def contents(place: Place) -> dict[str, Any]:
    """Return what is in there: for each database keys, expiring and a digest; for each graph its counts and a digest.

    Equal before and after a copy, nothing has changed between, so that it tells what is in the copy.
    """
    client = connect(place)
    found: dict[str, Any] = {"databases": {}, "graphs": {}}
    for number in sorted(keys(client)):
        here = connect(place, number)
        cursor: Any = 0
        lasting: set[str] = set()
        expiring: set[str] = set()
        while True:
            cursor, digests, volatile = here.eval(DIGESTS, 0, cursor)
            lasting.update(map(text, digests))  # SCAN may name a key twice
            expiring.update(map(text, volatile))
            if int(cursor) == 0:
                break
        if lasting or expiring:
            digest = f"{sum(int(each, 16) for each in lasting) % (1 << 64):016x}"
            found["databases"][str(number)] = {"keys": len(lasting), "expiring": len(expiring), "digest": digest}
    if "graph" in versions(client)["modules"]:
        for name in sorted(client.execute_command("GRAPH.LIST")):
            found["graphs"][text(name)] = graph(client, name)
    return found


def graph(client: Any, name: bytes) -> dict[str, Any]:
    """Return a graph's nodes, edges, labels, types, indexes, and a digest of nodes and edges spread over it."""

    def rows(query: str) -> list[Any]:
        reply = client.execute_command("GRAPH.RO_QUERY", name, query)
        return list(reply[1])

    def counts(query: str) -> dict[str, int]:
        return {text(key): count for key, count in sorted(rows(query))}

    nodes, edges = rows("MATCH (n) RETURN count(n)")[0][0], rows("MATCH ()-[e]->() RETURN count(e)")[0][0]
    step = [max(1, -(-count // SAMPLE)) for count in (nodes, edges)]
    sample = [
        rows(f"MATCH (n) WHERE id(n) % {step[0]} = 0 RETURN id(n), labels(n), n ORDER BY id(n) LIMIT {SAMPLE}"),
        rows(f"MATCH (a)-[e]->(b) WHERE id(e) % {step[1]} = 0 RETURN id(e), e ORDER BY id(e) LIMIT {SAMPLE}"),
    ]
    return {
        "nodes": nodes,
        "edges": edges,
        "labels": counts("MATCH (n) UNWIND labels(n) AS label RETURN label, count(n)"),
        "types": counts("MATCH ()-[e]->() RETURN type(e), count(e)"),
        "indexes": len(rows("CALL db.indexes() YIELD label RETURN label")),
        "digest": hashlib.sha256(repr(_sorted(sample)).encode()).hexdigest()[:16],
    }


def _sorted(value: Any) -> Any:
    """Return nested lists with those that are [name, value] pairs in order: properties have none."""
    if not isinstance(value, list):
        return value
    inner = [_sorted(each) for each in value]
    pairs = all(isinstance(each, list) and len(each) == 2 and isinstance(each[0], bytes) for each in inner)  # noqa: PLR2004
    return sorted(inner, key=repr) if pairs else inner


def copy(place: Place, target: Path, settings: Settings) -> dict[str, Any]:
    """Copy a server's data to ``target``, check it, and return facts for the manifest.

    ``exact`` says that ``contents`` are those of the copy: nothing was written while it was made.
    Raises ServerUnreachable, CopyCut, CopyCorrupt and DiskFull.
    """
    with named(place):
        client = connect(place)
        about = versions(client)
        before = contents(place)
        dump(place, target, settings)
        copied = rdb.look(target)
        after = contents(place)
        memory = int(info(client, "memory")["used_memory_dataset"])
    facts = {
        "rdb": copied.version,
        "first": copied.first,
        "memory": memory,
        "exact": before == after,
        "contents": after,
    }
    return about | facts


def dump(place: Place, target: Path, settings: Settings) -> None:
    """Run ``redis-cli --rdb``. Its file is point-in-time; a cut connection leaves a part of it and code 1."""
    argv = ["redis-cli", "-h", place.host, "-p", str(place.port), "--no-auth-warning"]
    argv += ["--user", place.username] if place.username else []
    argv += [*(["--tls"] if place.tls else []), "--rdb", str(target)]
    environ = {name: value for name, value in settings.environ.items() if not name.startswith("RCLONE_")}
    environ |= {"REDISCLI_AUTH": place.password} if place.password else {}
    done = children.run(
        argv,
        environ,
        moves=lambda: target.stat().st_size if target.exists() else 0,
        stall_seconds=settings.stall_seconds,
    )
    if done.code:
        stalled = "it stalled" if done.code == -signal.SIGKILL else ""
        said = stalled or settings.hide(done.stderr + done.stdout.decode(errors="replace")).replace("\n", " / ")[-300:]
        free = os.statvfs(target.parent)
        if "No space left" in said or free.f_bavail * free.f_frsize < 1 << 16:
            raise full_disk(str(target.parent))
        raise CopyCut(f"{place}: the copy was cut: {said}", "Look at the server's log, and try again.")
