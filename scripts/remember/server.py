"""The MCP server that OpenCode starts, over stdio; a worker runs beside it for as long as it does."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
from collections.abc import AsyncIterator, Awaitable
from typing import Annotated, Any

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import Field

from . import observe
from .service import Memories, NotFound, Refused
from .settings import Settings, Unavailable
from .worker import Worker, metrics

INSTRUCTIONS = (
    "A memory of this project that outlives the session. Search it before you ask the user what they may have told"
    " before; add to it what will matter in later sessions."
)
WORKER_PATIENCE_SECONDS = 5.0

Limit = Annotated[int, Field(ge=1, le=100, description="how many at most")]


async def _told(answer: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """Return an answer, or tell the model why there is none, in words that it can hand on to its user."""
    try:
        return await answer
    except (Unavailable, NotFound, Refused) as error:
        raise ToolError(str(error)) from None


def build(memories: Memories, lifespan: Any) -> MCPServer:
    """Return the server with its tools; their descriptions are what a model chooses by."""
    server = MCPServer("memory", instructions=INSTRUCTIONS, lifespan=lifespan, log_level="ERROR")

    async def add(
        text: Annotated[str, Field(description="one thing to remember, in full sentences that need no context")],
        about: Annotated[str, Field(description="where it comes from, as in: the user said, README")] = "",
    ) -> dict[str, Any]:
        """Remember something for later sessions.

        Use it when the user states a preference, a decision, a name, a date or a rule, or asks you to, and when you
        learn something about this project that took effort. Not for what the repository says, nor for secrets.
        """
        try:
            return await _told(memories.add(memories.make(text, about)))
        except Refused as error:
            raise ToolError(str(error)) from None

    async def search_facts(
        query: Annotated[str, Field(description="a question or key words")], limit: Limit = 10
    ) -> dict[str, Any]:
        """Search what is remembered, as single facts with the time since (and until) when each holds.

        Use it at the start of a task, and before asking the user what they may have told in an earlier session. A fact
        with "until" holds no longer. "waiting" counts memories that are not searchable yet: recent_memories shows them.
        """
        return await _told(memories.search(query, limit))

    async def search_entities(
        query: Annotated[str, Field(description="a name or a description")], limit: Limit = 10
    ) -> dict[str, Any]:
        """Search the people, systems, files and ideas that are remembered, each with a summary of all that is known.

        Use it when the question is who or what something is, rather than a single fact about it.
        """
        return await _told(memories.search(query, limit, entities=True))

    async def recent_memories(limit: Limit = 10) -> dict[str, Any]:
        """List the newest memories word for word, those not digested yet among them, with the ID of each.

        Use it when the user asks what you remember, to see what was added last, or to find the ID of one to forget.
        """
        return await _told(memories.episodes(limit))

    async def forget(
        id: Annotated[str, Field(description="of a memory, fact or entity, as the other tools show it")],  # noqa: A002
    ) -> dict[str, Any]:
        """Forget one memory with all that only it says, or one fact, or one entity, for good.

        Use it when the user asks to forget something or says that it was never true. What merely changed needs no
        forgetting: add the new state, and the old fact gets its "until".
        """
        return await _told(memories.forget(id))

    for tool in (add, search_facts, search_entities, recent_memories, forget):
        hints = ToolAnnotations(
            read_only_hint=tool not in (add, forget), destructive_hint=tool is forget, open_world_hint=False
        )
        server.add_tool(tool, description=inspect.getdoc(tool), annotations=hints, structured_output=False)
    return server


async def serve(settings: Settings) -> None:
    """Serve until stdin closes or SIGTERM; a worker that is in the middle of a memory leaves it to the next one."""
    memories = Memories(settings)
    running: list[asyncio.Task[None]] = []

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        running.append(asyncio.ensure_future(metrics(memories.queue)))
        if settings.workers and settings.has_model:
            running.append(asyncio.ensure_future(Worker(settings, memories.queue, memories.graph).run()))
        yield

    server = asyncio.ensure_future(build(memories, lifespan).run_stdio_async())
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    await asyncio.wait([server, asyncio.ensure_future(told.wait())], return_when=asyncio.FIRST_COMPLETED)
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running, timeout=WORKER_PATIENCE_SECONDS)
    if told.is_set():  # the server's thread still waits for a line, and would until its client closed the pipe
        observe.end()
        os._exit(0)
    await server
