"""The MCP server that OpenCode starts, on standard input and output, with a worker beside it."""

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

from lib.memory import spans
from lib.memory.service import Answer, Invalid, Memories, NotFound, make_memory
from lib.memory.settings import Settings, Unavailable
from lib.memory.worker import Worker, send_metrics

INSTRUCTIONS = (
    "Long-term memory of this project, kept between sessions. Search it at the start of a task and"
    " before you ask the user something. Add what later sessions need to know."
)
STOP_SECONDS = 5.0

Limit = Annotated[
    int,
    Field(
        ge=1,
        le=100,
        description="maximum number of results",
    ),
]


async def answer(result: Awaitable[Answer]) -> Answer:
    """Return a result; raise its failures as errors that the model reads."""
    try:
        return await result
    except (Unavailable, NotFound, Invalid) as error:
        raise ToolError(str(error)) from None


def build(memories: Memories, lifespan: Any) -> MCPServer:
    """Return the server with its tools. A tool's docstring is its description for the model."""
    server = MCPServer(
        "memory",
        instructions=INSTRUCTIONS,
        lifespan=lifespan,
        log_level="ERROR",
    )

    async def add(
        text: Annotated[
            str, Field(description="one thing to remember, in full sentences that need no context")
        ],
        about: Annotated[
            str, Field(description="the source, for example: the user said, README")
        ] = "",
    ) -> Answer:
        """Store something for later sessions.

        Use it when the user states a preference, a decision, a name, a date or a rule, or asks you
        to remember something, and when you learn something about this project that took effort.
        Do not store what is in the repository, or secrets.
        """
        try:
            memory = make_memory(text, about)
        except Invalid as error:
            raise ToolError(str(error)) from None
        return await answer(memories.add(memory))

    async def search_facts(
        query: Annotated[str, Field(description="a question or key words")], limit: Limit = 10
    ) -> Answer:
        """Search the memory for facts, with the times since and until when each is valid.

        Use it at the start of a task, and before you ask the user something that an earlier session
        may have answered. A fact with "until" is no longer valid. "waiting" is the number of
        memories that are not searchable yet; episodes lists them.
        """
        return await answer(memories.search(query, limit))

    async def search_entities(
        query: Annotated[str, Field(description="a name or a description")], limit: Limit = 10
    ) -> Answer:
        """Search the memory for people, systems, files and ideas, each with a summary.

        Use it when the question is who or what something is, rather than a single fact about it.
        """
        return await answer(memories.search(query, limit, entities=True))

    async def episodes(limit: Limit = 10) -> Answer:
        """List the newest memories word for word with their IDs, including those in the queue.

        Use it when the user asks what you remember, to see what was added last, or to find the ID
        of a memory to forget.
        """
        return await answer(memories.episodes(limit))

    async def forget(
        id: Annotated[str, Field(description="ID of a memory, fact or entity")],  # noqa: A002
    ) -> Answer:
        """Delete a memory and everything that only it says, or a fact, or an entity, permanently.

        Use it when the user asks to forget something or says that it was never true. If something
        has changed, add the new state instead: the old fact then gets its "until".
        """
        return await answer(memories.forget(id))

    for tool in (
        add,
        search_facts,
        search_entities,
        episodes,
        forget,
    ):
        hints = ToolAnnotations(
            read_only_hint=tool not in (add, forget),
            destructive_hint=tool is forget,
            open_world_hint=False,
        )
        description = inspect.getdoc(tool)
        server.add_tool(
            tool,
            description=description,
            annotations=hints,
            structured_output=False,
        )
    return server


async def serve(settings: Settings) -> None:
    """Serve until standard input closes or SIGTERM; an unfinished memory stays in the queue."""
    memories = Memories(settings)
    tasks: list[asyncio.Task[None]] = []

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        tasks.append(asyncio.ensure_future(send_metrics(memories.queue)))
        if settings.workers and settings.has_model:
            worker = Worker(settings, memories.queue, memories.graph)
            tasks.append(asyncio.ensure_future(worker.run()))
        yield

    server = asyncio.ensure_future(build(memories, lifespan).run_stdio_async())
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    signalled = asyncio.ensure_future(stopped.wait())
    await asyncio.wait([server, signalled], return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=STOP_SECONDS)
    if stopped.is_set():
        # The server's thread reads standard input until the client closes it.
        spans.stop()
        os._exit(0)
    await server
