"""The queue in Valkey: for each project a stream of memories to ingest, and one of dead letters.

Only the holder of a project's lease reads its queue, so memories are ingested in order. Keys, where
``{P}`` keeps the keys of a project in one slot of a cluster:

- ``memory:projects``      set of the projects that have queued something
- ``memory:{P}:queue``     stream of memories to ingest; an entry is deleted when it is done
- ``memory:{P}:dead``      stream of memories that cannot be ingested, with the reason
- ``memory:{P}:tries``     hash: how often an entry failed, and how often a worker died over it
- ``memory:{P}:lease``     the worker that ingests, with an expiry
- ``memory:{P}:pause``     why nothing is ingested at the moment, with an expiry
- ``memory:{P}:ids``       set of the IDs in the queue and the dead letters; adding one again does
  nothing
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

from lib.common.databases import Database
from lib.memory.connection import Connection

PROJECTS = "memory:projects"
COMMAND_SECONDS = 10.0

ADD = """
if redis.call('SADD', KEYS[2], ARGV[1]) == 0 then return 0 end
redis.call('XADD', KEYS[1], '*', unpack(ARGV, 2))
return 1
"""
REMOVE = """
if redis.call('XDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('SREM', KEYS[2], ARGV[2])
return 1
"""
# Whoever deletes the entry moves it: a worker that lost its lease moves nothing.
MOVE = """
if redis.call('XDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('XADD', KEYS[2], '*', unpack(ARGV, 2))
return 1
"""

Entry = tuple[str, dict[str, str]]
"""ID and fields of an entry of a stream."""


@dataclass(frozen=True)
class Memory:
    """A text to remember. ``at`` is ISO 8601 in UTC; ``id`` is a UUID, also of its episode."""

    id: str
    text: str
    at: str
    about: str = ""

    @classmethod
    def of(cls, fields: dict[str, str]) -> "Memory":
        """Return the memory in the fields of an entry."""
        return cls(fields["id"], fields["text"], fields["at"], fields.get("about", ""))


def key(project: str, name: str) -> str:
    """Return the name of a key of a project."""
    return f"memory:{{{project}}}:{name}"


def flatten(fields: dict[str, str]) -> list[str]:
    """Return names and values in turn, as XADD takes them."""
    return [word for field in fields.items() for word in field]


class Queue(Connection):
    """The queues of all projects."""

    def __init__(self, database: Database) -> None:
        super().__init__(database, COMMAND_SECONDS)

    async def command(self, *words: Any) -> Any:
        """Send a command and return its reply."""
        async with self.connected() as client:
            return await client.execute_command(*words)

    async def add(self, project: str, memory: Memory) -> bool:
        """Queue a memory; return False when it is in the queue or the dead letters."""
        await self.command("SADD", PROJECTS, project)
        keys = (key(project, "queue"), key(project, "ids"))
        words = flatten(asdict(memory))
        return bool(await self.command("EVAL", ADD, 2, *keys, memory.id, *words))

    async def projects(self) -> list[str]:
        """Return the projects that have ever queued something."""
        return sorted(await self.command("SMEMBERS", PROJECTS))

    async def length(self, project: str, stream: str = "queue") -> int:
        """Return how many memories are in the queue, or in ``dead``."""
        return int(await self.command("XLEN", key(project, stream)))

    async def entries(
        self, project: str, stream: str = "queue", count: int = 100_000
    ) -> list[Entry]:
        """Return the entries of the queue, or of ``dead``, oldest first."""
        name = key(project, stream)
        return list(await self.command("XRANGE", name, "-", "+", "COUNT", count))

    async def state(self, project: str) -> dict[str, Any]:
        """Return the length, the age of the oldest in seconds, dead letters, worker and pause."""
        state = {
            "waiting": await self.length(project),
            "oldest_seconds": 0.0,
            "dead": await self.length(project, "dead"),
            "worker": await self.command("GET", key(project, "lease")),
            "paused": await self.command("GET", key(project, "pause")),
        }
        for entry, _ in await self.entries(project, count=1):
            # The ID of an entry starts with the milliseconds of its time.
            age = time.time() - int(entry.partition("-")[0]) / 1000
            state["oldest_seconds"] = round(max(0, age), 1)
        return state

    async def acquire(self, project: str, owner: str, seconds: float) -> Any:
        """Return the lease of a project, or None if the project is paused or leased.

        The lease is a redis.asyncio.lock.Lock; ``owner`` is the value of its key.
        """
        async with self.connected() as client:
            if await client.exists(key(project, "pause")):
                return None
            lease = client.lock(
                key(project, "lease"),
                timeout=seconds,
                thread_local=False,
            )
            return lease if await lease.acquire(blocking=False, token=owner) else None

    async def renew(self, lease: Any) -> bool:
        """Restart the expiry of a lease; return False when another worker has it."""
        from redis.exceptions import LockNotOwnedError

        async with self.connected():
            try:
                return bool(await lease.reacquire())
            except LockNotOwnedError:
                return False

    async def pause(self, project: str, reason: str, seconds: float) -> None:
        """Let no worker ingest a project for ``seconds``."""
        milliseconds = max(1, int(seconds * 1000))
        await self.command("SET", key(project, "pause"), reason, "PX", milliseconds)

    async def count(self, project: str, entry: str, what: str, by: int = 1) -> int:
        """Count failures, deaths of workers ("died") or of FalkorDB ("crashed"); return the sum."""
        return int(await self.command("HINCRBY", key(project, "tries"), f"{entry}:{what}", by))

    async def remove(self, project: str, entry: str, memory: str, stream: str = "queue") -> int:
        """Delete the entry of a memory and its counts; return how many entries were deleted."""
        await self._remove_counts(project, entry)
        keys = (key(project, stream), key(project, "ids"))
        return int(await self.command("EVAL", REMOVE, 2, *keys, entry, memory))

    async def _remove_counts(self, project: str, entry: str) -> None:
        counts = [f"{entry}:{what}" for what in ("failed", "died", "crashed")]
        await self.command("HDEL", key(project, "tries"), *counts)

    async def bury(self, project: str, entry: str, memory: Memory, reason: str) -> None:
        """Move an entry to the dead letters."""
        buried = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        words = flatten(
            {
                **asdict(memory),
                "reason": reason,
                "buried": buried,
            }
        )
        keys = (key(project, "queue"), key(project, "dead"))
        await self.command("EVAL", MOVE, 2, *keys, entry, *words)
        await self._remove_counts(project, entry)

    async def retry(self, project: str, entry: str, memory: Memory) -> None:
        """Move a dead letter back to the queue."""
        keys = (key(project, "dead"), key(project, "queue"))
        await self.command("EVAL", MOVE, 2, *keys, entry, *flatten(asdict(memory)))

    async def forget(self, project: str, memory_id: str) -> int:
        """Delete a memory from the queue and the dead letters; return the number of entries."""
        removed = 0
        for stream in ("queue", "dead"):
            for entry, fields in await self.entries(project, stream):
                if fields["id"] == memory_id:
                    removed += await self.remove(project, entry, memory_id, stream)
        return removed

    async def forget_project(self, project: str) -> None:
        """Delete everything of a project."""
        keys = [
            key(project, name)
            for name in (
                "queue",
                "dead",
                "tries",
                "pause",
                "ids",
            )
        ]
        await self.command("DEL", *keys)
        await self.command("SREM", PROJECTS, project)
