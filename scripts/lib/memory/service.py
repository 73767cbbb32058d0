"""Operations on the memory of one project, for the command line and the MCP server."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from lib.memory.graph import Graph
from lib.memory.queue import Memory, Queue
from lib.memory.settings import Settings, Unavailable

MAX_LENGTH = 100_000
"""Characters of one memory; no model processes a longer text at once."""
DIRECT_SECONDS = 300.0
IDLE_SECONDS = 60
"""How long memories may wait without a worker; those that run look twice in a second."""

Answer = dict[str, Any]


class Invalid(Exception):
    """The input is invalid; the message says why."""


class NotFound(Exception):
    """Nothing has this ID."""


def check_id(text: str) -> str:
    """Return ``text`` if it is a UUID in lower case. Raises Invalid."""
    with contextlib.suppress(ValueError):
        if str(uuid.UUID(text)) == text:
            return text
    raise Invalid(f"{text[:50]!r} is not an ID; IDs are UUIDs in lower case")


def make_memory(text: str, about: str = "", at: str = "", id: str = "") -> Memory:  # noqa: A002
    """Return a new memory; ``at`` is ISO 8601, by default now. Raises Invalid."""
    if not text.strip():
        raise Invalid("the text is empty")
    if len(text) > MAX_LENGTH:
        raise Invalid(f"the text has {len(text)} characters, more than {MAX_LENGTH}: split it")
    try:
        time = datetime.fromisoformat(at) if at else datetime.now(UTC)
    except ValueError:
        raise Invalid(f"{at[:50]!r} is not a time in ISO 8601") from None
    time = time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    # Lone surrogates cannot be stored.
    text, about = (part.encode(errors="replace").decode() for part in (text, about))
    return Memory(check_id(id) if id else str(uuid.uuid4()), text, time.isoformat(), about)


class Memories:
    """The memory of one project. Every method raises Unavailable when a service is missing."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.project = settings.project
        self.queue = Queue(settings.valkey)
        self.graph = Graph(settings)

    async def close(self) -> None:
        """Close all connections."""
        await self.queue.close()
        await self.graph.close()

    async def add(self, memory: Memory, *, given: bool = False) -> Answer:
        """Queue a memory; without Valkey, ingest it at once, which takes seconds.

        With ``given`` its ID is the caller's, so that it may be in the graph already.
        """
        known = False
        if given:
            with contextlib.suppress(Unavailable):
                known = await self.graph.has(self.project, memory.id)
        try:
            added = not known and await self.queue.add(self.project, memory)
        except Unavailable as error:
            return await self._ingest(memory, error)
        state = "queued" if added else "already known"
        answer = {
            "id": memory.id,
            "project": self.project,
            "state": state,
        }
        if not self.settings.has_model:
            answer["note"] = (
                "stays in the queue until OPENAI_API_KEY or OPENAI_BASE_URL is set for a worker"
            )
        return answer

    async def _ingest(self, memory: Memory, reason: Unavailable) -> Answer:
        """Ingest a memory directly. Raises Unavailable when that fails too."""
        ingest = self.graph.ingest(self.project, memory)
        try:
            added = await asyncio.wait_for(ingest, DIRECT_SECONDS)
        except Exception as error:
            detail = str(error) or type(error).__name__
            raise Unavailable(
                f"the memory was not stored: {reason}; ingesting it directly failed: {detail}"[:600]
            ) from error
        return {
            "id": memory.id,
            "project": self.project,
            "state": "ingested" if added else "already known",
            "note": f"ingested directly, without a queue: {reason}",
        }

    async def search(self, query: str, limit: int = 10, *, entities: bool = False) -> Answer:
        """Return the facts (or entities) that fit a query, and how many memories are queued."""
        found, problem = await self.graph.search(
            self.project,
            query,
            limit,
            entities=entities,
        )
        answer: Answer = {"project": self.project, "entities" if entities else "facts": found}
        if problem:
            answer["note"] = f"searched by words alone: {problem}"
        with contextlib.suppress(Unavailable):
            if waiting := await self.queue.length(self.project):
                answer["waiting"] = waiting
        return answer

    async def episodes(self, limit: int = 10) -> Answer:
        """Return the newest memories as they were added, with their states."""
        answer: Answer = {"project": self.project}
        queued = []
        ingested = []
        try:
            queued = await self._queued()
        except Unavailable as error:
            answer["note"] = str(error)
        try:
            ingested = await self.graph.episodes(self.project, limit)
        except Unavailable as error:
            if "note" in answer:
                raise
            answer["note"] = str(error)
        # A memory that is being ingested is in both.
        episodes = {episode["id"]: episode for episode in [*ingested, *queued]}
        newest = sorted(
            episodes.values(),
            key=lambda episode: str(episode["at"]),
            reverse=True,
        )
        return {**answer, "episodes": newest[:limit]}

    async def _queued(self) -> list[Answer]:
        """Return the memories in the queue and the dead letters."""
        found = []
        for stream, state in (("queue", "queued"), ("dead", "dead letter")):
            for _, fields in await self.queue.entries(self.project, stream):
                found.append({**vars(Memory.of(fields)), "state": state})
        return found

    async def forget(self, id: str) -> Answer:  # noqa: A002 -- the name of the tool's argument
        """Delete a memory with what only it says, or a fact, or an entity. Raises NotFound."""
        check_id(id)
        removed = 0
        with contextlib.suppress(Unavailable):
            removed = await self.queue.forget(self.project, id)
        kind = await self.graph.forget(self.project, id)
        if not kind and not removed:
            raise NotFound(f"nothing in the memory of {self.project} has the ID {id}")
        return {
            "project": self.project,
            "forgot": kind or "memory",
            "id": id,
        }

    async def forget_everything(self) -> Answer:
        """Delete the memory of the project."""
        answer: Answer = {"project": self.project, "forgot": "everything"}
        try:
            await self.queue.forget_project(self.project)
        except Unavailable as error:
            answer["note"] = f"the queue was not deleted: {error}"
        answer["graph"] = await self.graph.forget_project(self.project)
        return answer

    async def status(self) -> Answer:
        """Return the state of queue, graph and model, and a list of problems."""
        problems: list[str] = []
        answer: Answer = {"project": self.project, "problems": problems}
        try:
            queue = answer["queue"] = await self.queue.state(self.project)
            if not await self.queue.is_durable():
                problems.append("Valkey does not write each change to disk: set appendonly yes")
            if queue["dead"]:
                problems.append(f"{queue['dead']} dead letters: run memory dead")
            if queue["paused"]:
                problems.append(f"the queue is paused: {queue['paused']}")
            idle = queue["waiting"] and not queue["worker"] and not queue["paused"]
            if idle and queue["oldest_seconds"] > IDLE_SECONDS:
                oldest = f"{queue['oldest_seconds']:.0f} s"
                problems.append(
                    f"memories wait: {queue['waiting']}, the oldest for {oldest},"
                    " and no worker runs: memory work"
                )
        except Unavailable as error:
            problems.append(str(error))
        try:
            answer["graph"] = await self.graph.counts(self.project)
            if not await self.graph.is_durable():
                problems.append("FalkorDB does not write each change to disk: set appendonly yes")
        except Unavailable as error:
            problems.append(str(error))
        try:
            self.settings.require_model()
            answer["model"] = self.settings.model or "Graphiti's default"
        except Unavailable as error:
            problems.append(str(error))
        return answer

    async def dead(self) -> Answer:
        """Return the dead letters with their reasons, oldest first."""
        entries = await self.queue.entries(self.project, "dead")
        return {"project": self.project, "dead": [fields for _, fields in entries]}

    async def retry(self, ids: list[str]) -> Answer:
        """Queue dead letters again: the given memories, or all. Raises NotFound."""
        retried = []
        for entry, fields in await self.queue.entries(self.project, "dead"):
            memory = Memory.of(fields)
            if not ids or memory.id in ids:
                await self.queue.retry(self.project, entry, memory)
                retried.append(memory.id)
        if missing := set(ids).difference(retried):
            raise NotFound(f"no dead letter has the ID {', '.join(sorted(missing))}")
        return {"project": self.project, "retried": retried}

    async def export(self) -> AsyncIterator[Answer]:
        """Yield every memory once: those in the graph, oldest first, then those in the queue."""
        memories = await self.graph.episodes(self.project, 1_000_000)
        memories.reverse()
        with contextlib.suppress(Unavailable):
            memories += await self._queued()
        exported = set()
        for memory in memories:
            if memory["id"] not in exported:
                exported.add(memory["id"])
                yield {
                    name: memory[name]
                    for name in (
                        "id",
                        "text",
                        "at",
                        "about",
                    )
                }
