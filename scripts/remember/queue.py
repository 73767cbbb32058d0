"""The queue in Valkey: for each project a stream of memories to digest, a consumer group, and a stream of dead letters.

Whoever holds a project's lease is its one reader, so that memories are digested in order; the group has one consumer
name, whose pending entries are what the holder before left undone. Keys (``{}`` keeps a project's in one cluster slot):

- ``memory:projects``         set of projects that have ever queued something
- ``memory:wake``             stream of one entry, which workers wait on
- ``memory:{P}:queue``        stream of what is to be digested; an entry is removed once it is
- ``memory:{P}:dead``         stream of what could not be, with the reason
- ``memory:{P}:tries``        hash: how often an entry has failed, and how often a worker was ended over it
- ``memory:{P}:lease``        who digests, until when
- ``memory:{P}:rest``         why nobody does for now, until when
- ``memory:{P}:seen:ID``      this memory was queued: adding it again within a week does nothing
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from .settings import Place

GROUP, CONSUMER = "workers", "holder"
SEEN_SECONDS = 7 * 24 * 3600
PROJECTS, WAKE = "memory:projects", "memory:wake"
COMMAND_SECONDS = 10.0

ADD = """
if not redis.call('SET', KEYS[2], '1', 'NX', 'EX', ARGV[1]) then return '' end
return redis.call('XADD', KEYS[1], '*', unpack(ARGV, 2))
"""
RENEW = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end return 0"
RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
DONE = """
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('HDEL', KEYS[2], ARGV[2] .. ':failed', ARGV[2] .. ':ended')
return redis.call('XDEL', KEYS[1], ARGV[2])
"""
BURY = """
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
redis.call('XADD', KEYS[2], '*', unpack(ARGV, 3))
redis.call('HDEL', KEYS[3], ARGV[2] .. ':failed', ARGV[2] .. ':ended')
return redis.call('XDEL', KEYS[1], ARGV[2])
"""
RETRY = """
local found = redis.call('XRANGE', KEYS[2], ARGV[1], ARGV[1])
if #found == 0 then return 0 end
redis.call('XADD', KEYS[1], '*', unpack(found[1][2]))
return redis.call('XDEL', KEYS[2], ARGV[1])
"""


@dataclass(frozen=True)
class Memory:
    """What is to be remembered. ``at`` is ISO 8601 in UTC; ``id`` is its own for ever, and its episode's too."""

    id: str
    text: str
    at: str
    about: str = ""

    @classmethod
    def of(cls, fields: dict[str, str]) -> Memory:
        """Return the memory in an entry's fields."""
        return cls(fields["id"], fields["text"], fields["at"], fields.get("about", ""))


class Queue:
    """All projects' queues. Whatever is asked raises Unavailable when Valkey does not answer."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._client: Any = None
        self.answered = False

    async def ask(self, *words: Any) -> Any:
        """Send one command and return its reply; bytes come as str. Raises Unavailable, and redis' ResponseError."""
        if self._client is None:
            await asyncio.to_thread(__import__, "redis.asyncio")  # 0.1 s in which the server goes on answering
            import redis.asyncio

            # Its own tries would take three seconds to say that nobody listens.
            options: dict[str, Any] = {**self._place.options(COMMAND_SECONDS), "retry": None}
            self._client = redis.asyncio.Redis(**options, decode_responses=True, protocol=2)
        from redis.exceptions import AuthenticationError, ConnectionError, TimeoutError  # noqa: A004

        try:
            answer = await self._client.execute_command(*words)
        except (AuthenticationError, ConnectionError, TimeoutError, OSError) as error:
            raise self._place.missing(error) from error
        self.answered = True
        return answer

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()

    @staticmethod
    def key(project: str, what: str) -> str:
        """Return the name of one of a project's keys."""
        return f"memory:{{{project}}}:{what}"

    async def _script(self, script: str, project: str, keys: Iterable[str], *words: Any) -> Any:
        names = [self.key(project, name) for name in keys]
        return await self.ask("EVAL", script, len(names), *names, *words)

    async def add(self, project: str, memory: Memory) -> bool:
        """Queue a memory; return False when it already was. A second call with the same memory does nothing."""
        await self.ask("SADD", PROJECTS, project)
        flat = [word for pair in asdict(memory).items() for word in pair]
        added = await self._script(ADD, project, ("queue", f"seen:{memory.id}"), SEEN_SECONDS, *flat)
        if added:
            await self.wake(project)
        return bool(added)

    async def wake(self, project: str) -> None:
        """Tell workers that there is something to do."""
        await self.ask("XADD", WAKE, "MAXLEN", 1, "*", "project", project)

    async def woken(self, last: str, seconds: float) -> str:
        """Wait until there may be something to do; return what to hand in as ``last`` the next time, at first "$"."""
        answer = await self.ask("XREAD", "BLOCK", int(seconds * 1000) or 1, "STREAMS", WAKE, last)
        return str(answer[0][1][-1][0]) if answer else last

    async def projects(self) -> list[str]:
        """Return the projects that have ever queued something."""
        return sorted(await self.ask("SMEMBERS", PROJECTS))

    async def depth(self, project: str) -> int:
        """Return how many memories wait or are being digested."""
        return int(await self.ask("XLEN", self.key(project, "queue")))

    async def entries(
        self, project: str, what: str = "queue", count: int = 100_000
    ) -> list[tuple[str, dict[str, str]]]:
        """Return the IDs and fields of the queue, or of what is ``dead``, oldest first."""
        return list(await self.ask("XRANGE", self.key(project, what), "-", "+", "COUNT", count))

    async def state(self, project: str) -> dict[str, Any]:
        """Return depth, age of the oldest in seconds, how many are dead, who digests, and why nobody does."""
        first = await self.entries(project, count=1)
        dead = int(await self.ask("XLEN", self.key(project, "dead")))
        age = max(0.0, time.time() - int(first[0][0].split("-")[0]) / 1000) if first else 0.0
        return {
            "waiting": await self.depth(project),
            "oldest_seconds": round(age, 1),
            "dead": dead,
            "worker": await self.ask("GET", self.key(project, "lease")),
            "resting": await self.ask("GET", self.key(project, "rest")),
        }

    async def keeps(self) -> bool:
        """Say whether Valkey writes each change to its disk."""
        return bool((await self.ask("INFO", "persistence"))["aof_enabled"])

    # What the holder of a lease does.

    async def take(self, project: str, token: str, seconds: float) -> float:
        """Take a project's lease and return 0; where somebody has it or the project rests, the seconds left of that."""
        resting = int(await self.ask("PTTL", self.key(project, "rest")))
        if resting < 0 and await self.ask("SET", self.key(project, "lease"), token, "NX", "PX", int(seconds * 1000)):
            return 0.0
        return max(resting, int(await self.ask("PTTL", self.key(project, "lease"))), 1) / 1000

    async def renew(self, project: str, token: str, seconds: float) -> bool:
        """Keep a lease for longer; return False when it is somebody else's by now."""
        return bool(await self._script(RENEW, project, ("lease",), token, int(seconds * 1000)))

    async def release(self, project: str, token: str) -> None:
        """Give a lease back, if it still is ours."""
        await self._script(RELEASE, project, ("lease",), token)

    async def rest(self, project: str, why: str, seconds: float) -> None:
        """Let nobody digest a project for a while."""
        await self.ask("SET", self.key(project, "rest"), why, "PX", max(1, int(seconds * 1000)))

    async def next(self, project: str) -> tuple[str, Memory] | None:
        """Return the oldest entry that is not done: first what a holder left, then what is new. None when all is."""
        from redis.exceptions import ResponseError

        queue = self.key(project, "queue")
        for since in ("0", ">"):
            words = ("XREADGROUP", "GROUP", GROUP, CONSUMER, "COUNT", 1, "STREAMS", queue, since)
            try:
                answer = await self.ask(*words)
            except ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise
                await self.ask("XGROUP", "CREATE", queue, GROUP, "0", "MKSTREAM")
                answer = await self.ask(*words)
            for entry, fields in answer[0][1] if answer else ():
                if fields:
                    return str(entry), Memory.of(fields)
                await self.ask("XACK", queue, GROUP, entry)  # it was deleted by somebody's own XDEL
                return await self.next(project)
        return None

    async def count(self, project: str, entry: str, what: str, by: int = 1) -> int:
        """Count a failure ("failed"), or a worker's end over this entry ("ended"); return how many there were."""
        return int(await self.ask("HINCRBY", self.key(project, "tries"), f"{entry}:{what}", by))

    async def done(self, project: str, entry: str) -> None:
        """Take an entry out for good: it is in the graph, or forgotten."""
        await self._script(DONE, project, ("queue", "tries"), GROUP, entry)

    async def bury(self, project: str, entry: str, memory: Memory, reason: str) -> None:
        """Move an entry to the dead letters."""
        fields = {**asdict(memory), "reason": reason, "buried": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        flat = [word for pair in fields.items() for word in pair]
        await self._script(BURY, project, ("queue", "dead", "tries"), GROUP, entry, *flat)

    async def retry(self, project: str, entry: str) -> bool:
        """Queue a dead letter again; return False when there is none of that ID."""
        moved = bool(await self._script(RETRY, project, ("queue", "dead"), entry))
        await self.wake(project)
        return moved

    async def forget(self, project: str, memory: str) -> int:
        """Take a memory out of the queue and the dead letters; return how many entries it had."""
        found = 0
        for entry, fields in await self.entries(project):
            if fields["id"] == memory:
                await self.done(project, entry)
                found += 1
        for entry, fields in await self.entries(project, "dead"):
            if fields["id"] == memory:
                found += int(await self.ask("XDEL", self.key(project, "dead"), entry))
        return found

    async def forget_project(self, project: str) -> None:
        """Drop everything a project has in Valkey."""
        await self.ask("DEL", *(self.key(project, name) for name in ("queue", "dead", "tries", "rest")))
        await self.ask("SREM", PROJECTS, project)
