"""What can be done with a project's memory; the command line and the MCP server both call this."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from .graph import Graph
from .queue import Memory, Queue
from .settings import Settings, Unavailable

LONGEST = 100_000
"""Characters of one memory: what is longer is a document, which no model digests in one go."""
DIRECT_SECONDS = 300.0
RESTART_PAUSES = (0.1, 0.4, 1.0)
"""Seconds between tries to reach a Valkey that has answered before, and may be starting again."""
UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Refused(Exception):
    """What was asked for cannot be done as it was asked; the message says why."""


class NotFound(Exception):
    """There is nothing of that ID."""


class Memories:
    """One project's memory. Every method raises Unavailable when what it needs does not answer."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.project = settings.project
        self.queue, self.graph = Queue(settings.valkey), Graph(settings)

    async def close(self) -> None:
        """Close all connections."""
        await self.queue.close()
        await self.graph.close()

    def make(self, text: str, about: str = "", at: str = "", id: str = "") -> Memory:  # noqa: A002 -- the field's name
        """Return a memory of now, or of ``at`` in ISO 8601. Raises Refused."""
        if not text.strip():
            raise Refused("there is nothing to remember: the text is empty")
        if len(text) > LONGEST:
            raise Refused(f"{len(text)} characters are too many for one memory; {LONGEST} are allowed: split it")
        if id and not UUID.fullmatch(id):
            raise Refused(f"{id[:50]!r} is not the ID of a memory: it is a UUID in lower case")
        try:
            when = datetime.fromisoformat(at) if at else datetime.now(UTC)
        except ValueError:
            raise Refused(f"{at[:50]!r} is not a time as ISO 8601 writes it") from None
        when = when.astimezone(UTC) if when.tzinfo else when.replace(tzinfo=UTC)
        text, about = (part.encode(errors="replace").decode() for part in (text, about))
        return Memory(id or str(uuid.uuid4()), text, when.isoformat(), about)

    async def add(self, memory: Memory) -> dict[str, Any]:
        """Keep a memory: in the queue, or where Valkey does not answer in the graph, which takes seconds."""
        for pause in (*RESTART_PAUSES, None):
            try:
                added = await self.queue.add(self.project, memory)
                break
            except Unavailable as error:
                if pause is None or not self.queue.answered:
                    return await self._add_directly(memory, error)
            await asyncio.sleep(pause)
        said = {"id": memory.id, "project": self.project, "state": "queued" if added else "already known"}
        if not self.settings.has_model:
            said["note"] = (
                "it is kept, and waits: nothing here digests it until OPENAI_API_KEY or OPENAI_BASE_URL is set"
            )
        return said

    async def _add_directly(self, memory: Memory, why: Unavailable) -> dict[str, Any]:
        try:
            added = await asyncio.wait_for(self.graph.digest(self.project, memory), DIRECT_SECONDS)
        except Unavailable as error:
            raise Unavailable(
                f"nothing was kept. {why}. Without it memories are digested at once, but {error}"
            ) from error
        except Exception as error:
            raise Unavailable(f"nothing was kept. {why}. Without it: {type(error).__name__}: {error}"[:600]) from error
        state = "digested" if added else "already known"
        return {
            "id": memory.id,
            "project": self.project,
            "state": state,
            "note": f"added directly, without a queue: {why}",
        }

    async def search(self, query: str, limit: int = 10, *, entities: bool = False) -> dict[str, Any]:
        """Return the facts (or entities) that fit a query best, and how many memories are not digested yet."""
        found, why = await self.graph.search(self.project, query, limit, entities=entities)
        said: dict[str, Any] = {"project": self.project, "entities" if entities else "facts": found}
        if why:
            said["note"] = f"searched by words alone: {why}"
        try:
            if waiting := await self.queue.depth(self.project):
                said["waiting"] = waiting
        except Unavailable:
            pass
        return said

    async def episodes(self, limit: int = 10) -> dict[str, Any]:
        """Return the newest memories as they were added, those that still wait among them."""
        waiting: list[dict[str, Any]] = []
        notes = []
        try:
            for state, what in (("waiting", "queue"), ("dead letter", "dead")):
                entries = await self.queue.entries(self.project, what)
                waiting += [{**vars(Memory.of(fields)), "state": state} for _, fields in entries]
        except Unavailable as error:
            notes.append(str(error))
        digested: list[dict[str, Any]] = []
        try:
            digested = await self.graph.episodes(self.project, limit)
        except Unavailable as error:
            if notes:
                raise
            notes.append(str(error))
        known = {episode["id"] for episode in waiting}
        episodes = waiting + [episode for episode in digested if episode["id"] not in known]
        newest = sorted(episodes, key=lambda episode: str(episode["at"]), reverse=True)[:limit]
        return {"project": self.project, "memories": newest, **({"note": " ".join(notes)} if notes else {})}

    async def forget(self, id: str) -> dict[str, Any]:  # noqa: A002 -- the field's name
        """Remove a memory and what only it says, or a fact, or an entity. Raises NotFound."""
        if not UUID.fullmatch(id):
            raise Refused(f"{id[:50]!r} is not an ID: those of memories, facts and entities are UUIDs")
        try:
            queued = await self.queue.forget(self.project, id)
        except Unavailable:
            queued = 0
        what = await self.graph.forget(self.project, id)
        if not what and not queued:
            raise NotFound(f"nothing in the memory of {self.project} has the ID {id}")
        return {"project": self.project, "forgot": what or "memory", "id": id}

    async def forget_everything(self) -> dict[str, Any]:
        """Remove a project's whole memory."""
        try:
            await self.queue.forget_project(self.project)
            note = {}
        except Unavailable as error:
            note = {"note": f"only the graph: {error}"}
        return {
            "project": self.project,
            "forgot": "everything",
            "graph": await self.graph.forget_project(self.project),
            **note,
        }

    async def status(self) -> dict[str, Any]:
        """Say what answers, and what this project's memory holds; what does not answer is said, not raised."""
        said: dict[str, Any] = {"project": self.project, "problems": []}
        try:
            said["queue"] = await self.queue.state(self.project)
            if not await self.queue.keeps():
                said["problems"].append("Valkey does not write each change to disk: set its appendonly to yes")
            if said["queue"]["dead"]:
                said["problems"].append(f"{said['queue']['dead']} dead letters: see memory dead")
            if said["queue"]["resting"]:
                said["problems"].append(f"not digesting for now: {said['queue']['resting']}")
        except Unavailable as error:
            said["problems"].append(str(error))
        try:
            said["graph"] = await self.graph.counts(self.project)
            if not await self.graph.keeps():
                said["problems"].append("FalkorDB does not write each change to disk: set its appendonly to yes")
        except Unavailable as error:
            said["problems"].append(str(error))
        try:
            self.settings.need_model()
            said["model"] = self.settings.model or "Graphiti's default"
        except Unavailable as error:
            said["problems"].append(str(error))
        return said

    async def dead(self) -> dict[str, Any]:
        """Return the dead letters, oldest first, each with its reason."""
        entries = await self.queue.entries(self.project, "dead")
        return {"project": self.project, "dead": [fields for _, fields in entries]}

    async def retry(self, ids: list[str]) -> dict[str, Any]:
        """Queue dead letters again: those of these memories, or all. Raises NotFound."""
        chosen = [row for row in await self.queue.entries(self.project, "dead") if not ids or row[1]["id"] in ids]
        if missing := set(ids) - {fields["id"] for _, fields in chosen}:
            raise NotFound(f"there is no dead letter {', '.join(sorted(missing))}")
        moved = [fields["id"] for entry, fields in chosen if await self.queue.retry(self.project, entry)]
        return {"project": self.project, "retried": moved}

    async def export(self) -> AsyncIterator[dict[str, Any]]:
        """Yield every memory as it was added, each once: those in the graph, oldest first, then those that wait."""
        seen = set()
        skip, rows = 0, await self.graph.episodes(self.project, 1_000_000)
        for episode in reversed(rows[skip:]):
            seen.add(episode["id"])
            yield {key: episode[key] for key in ("id", "text", "at", "about")}
        with_queue: list[tuple[str, dict[str, str]]] = []
        try:
            for what in ("queue", "dead"):
                with_queue += await self.queue.entries(self.project, what)
        except Unavailable:
            return
        for _, fields in with_queue:
            if fields["id"] not in seen:
                seen.add(fields["id"])
                yield vars(Memory.of(fields))
