"""FalkorDB and Valkey: connect, and describe the content."""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import redis
from redis.backoff import ConstantBackoff
from redis.exceptions import ConnectionError  # noqa: A004
from redis.retry import Retry

from lib.backup import process
from lib.backup.errors import ServerUnreachable
from lib.common.databases import Database

SECONDS = 30
ENDING_SECONDS = 8
"""The same after a signal. A replica that cannot open a file blocks for five seconds."""

RETRIES = 6
RETRY_SECONDS = 0.5
SCAN_COUNT = 1000
SAMPLE = 300
"""About how many keys and nodes of each database and graph are compared with their values."""

# Digests of keys, computed in the server: of those named, or of some that SCAN returns. Members of
# sets and hashes have no order, so their hashes are added up. Left out are keys that expire, also
# in a field, since they may be gone when the content is compared, the content of keys that would
# block the server, and telemetry{...}, which FalkorDB writes at each query.
DIGESTS = """
local function h(s) return tonumber(string.sub(redis.sha1hex(s), 1, 12), 16) end
local many, long = 1000, 65536
local function expires(key, flat)
    local fields = {}
    for i = 1, #flat, 2 do fields[#fields + 1] = flat[i] end
    local seconds = redis.pcall('HTTL', key, 'FIELDS', #fields, unpack(fields))
    if seconds.err then return false end
    for _, s in ipairs(seconds) do if s >= 0 then return true end end
    return false
end
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
        if t == 'hash' and expires(key, flat) then return nil end
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
local keys, found = KEYS, {}
if #keys == 0 then keys = redis.call('SCAN', 0, 'COUNT', ARGV[1])[2] end
for _, key in ipairs(keys) do
    local t = redis.call('TYPE', key).ok
    local plain = string.sub(key, 1, 10) ~= 'telemetry{' and t ~= 'graphmeta' and #key < 256
    if plain and redis.call('PTTL', key) < 0 then
        local digest = value(t, key)
        if digest then
            found[#found + 1] = key
            found[#found + 1] = string.format('%s:%.0f', t, digest)
        end
    end
end
return found
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
    seconds = ENDING_SECONDS if process.ending.is_set() else SECONDS
    return server.client(seconds, db=database, decode_responses=False, retry=retry)


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


def needed_modules(server: Database) -> dict[str, int]:
    """Return the modules without which the data cannot be loaded.

    Those are the loaded ones, and of those that are part of the server (vectorset of Redis 8, lua
    of Valkey 9) the ones that have keys.
    """
    client = connect(server)
    needed: dict[str, int] = versions(client)["modules"]
    for row in client.module_list():
        fields = {text(name): value for name, value in row.items()}
        name = text(fields["name"])
        databases = (connect(server, number) for number in keyspace(client))
        keys = (each.scan_iter(_type=name, count=SCAN_COUNT) for each in databases)
        if not fields.get("path") and not any(any(found) for found in keys):
            del needed[name]
    return needed


def keyspace(client: Any) -> dict[int, dict[str, int]]:
    """Return INFO's numbers of keys and expires of each database that is not empty."""
    found = client.info("keyspace")
    return {int(name.removeprefix("db")): numbers for name, numbers in found.items()}


def rdb_version(client: Any, *, keep: bool = False) -> int:
    """Return the newest RDB version that a server reads: the one at the end of its DUMP.

    It sets the key MARKER, and removes it, also one from before, unless ``keep`` is set.
    """
    dumped = client.eval(PROBE, 1, MARKER, "keep" if keep else "")
    return int.from_bytes(dumped[-10:-8], "little")


def holds_data(server: Database) -> bool:
    """Return whether there is any key, apart from FalkorDB's telemetry."""
    for number in sorted(keyspace(connect(server))):
        for key in connect(server, number).scan_iter(count=SCAN_COUNT):
            if not key.startswith(b"telemetry{"):
                return True
    return False


def contents(server: Database, expected: Any = None) -> dict[str, Any]:
    """Return the content: key counts and digests of some keys for each database, and the graphs.

    The digests are of the keys in ``expected``, contents of before, or of any.
    """
    client = connect(server)
    graphs = {}
    if "graph" in versions(client)["modules"]:
        for name in sorted(client.execute_command("GRAPH.LIST")):
            graphs[text(name)] = graph_contents(client, name)
    databases = {}
    for number, numbers in sorted(keyspace(client).items()):
        database = connect(server, number)
        lasting = numbers["keys"] - numbers["expires"]
        if graphs:
            # FalkorDB writes telemetry at each query, and graphmeta while it saves.
            passing = set(database.scan_iter("telemetry{*", count=SCAN_COUNT))
            passing.update(database.scan_iter(_type="graphmeta", count=SCAN_COUNT))
            lasting -= len(passing)
        before = (expected or {"databases": {}})["databases"].get(str(number), {})
        named = [key.encode("latin-1") for key in before.get("sample", ())]
        flat = database.eval(DIGESTS, len(named), *named, SAMPLE)
        sample = {
            key.decode("latin-1"): text(digest)
            for key, digest in zip(flat[::2], flat[1::2], strict=True)
        }
        if lasting:
            databases[str(number)] = {"keys": lasting, "sample": sample}
    return {"databases": databases, "graphs": graphs}


def graph_contents(client: Any, name: bytes) -> dict[str, Any]:
    """Return the counts of a graph, and a digest of its first nodes."""

    def rows(query: str) -> list[Any]:
        return list(client.execute_command("GRAPH.RO_QUERY", name, query)[1])

    def count(pattern: str) -> int:
        return int(rows(f"MATCH {pattern} RETURN count(x)")[0][0])  # without a scan

    labels = sorted(text(row[0]) for row in rows("CALL db.labels()"))
    types = sorted(text(row[0]) for row in rows("CALL db.relationshipTypes()"))
    first = sorted(map(repr, rows(f"MATCH (n) RETURN n LIMIT {SAMPLE}")))
    return {
        "nodes": count("(x)"),
        "edges": count("()-[x]->()"),
        "labels": {label: count(f"(x:`{label}`)") for label in labels},
        "types": {kind: count(f"()-[x:`{kind}`]->()") for kind in types},
        "indexes": len(rows("CALL db.indexes() YIELD label RETURN label")),
        "sample": hashlib.sha256("".join(first).encode()).hexdigest(),
    }


def get_config(client: Any, name: str) -> str:
    """Return a configuration parameter of a server; empty if it has none of that name."""
    values = client.config_get(name).values()
    return "".join(text(value or "") for value in values)
