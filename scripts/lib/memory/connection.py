"""A connection to FalkorDB or Valkey that reports every failure as Unavailable."""

import asyncio
import contextlib
import importlib
import re
from collections.abc import AsyncIterator
from typing import Any

from lib.common.databases import Database
from lib.memory.settings import Lost, Rejected, Unavailable

PRODUCTS = {"FALKORDB": "FalkorDB", "VALKEY": "Valkey"}


class Connection:
    """Base class of Queue and Graph. Every method raises Unavailable."""

    def __init__(self, database: Database, timeout: float) -> None:
        self._database = database
        self._timeout = timeout
        self._client: Any = None

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Any]:
        """Provide a client of redis-py; raise its errors as Unavailable or Rejected."""
        if self._client is None:
            # The import takes 0.1 s, in which the MCP server goes on answering.
            await asyncio.to_thread(importlib.import_module, "redis.asyncio")
            self._client = self._database.async_client(self._timeout)
        from redis.exceptions import ConnectionError, RedisError, TimeoutError  # noqa: A004

        database = self._database
        name = database.name
        try:
            yield self._client
        except (ConnectionError, TimeoutError, OSError) as error:
            text = f"{type(error).__name__}: {error}"
            reason = f" ({text})" if re.search("auth|certificate|ssl", text, re.IGNORECASE) else ""
            if re.search("closed by server|reset by peer", text):
                raise Lost(
                    f"{PRODUCTS[name]} at {database.address} closed the connection during a"
                    " command; it may have crashed: see its log"
                ) from error
            raise Unavailable(
                f"{PRODUCTS[name]} does not answer at {database.address}{reason};"
                f" check {name}_HOST, {name}_PORT, {name}_PASSWORD and {name}_TLS"
            ) from error
        except RedisError as error:
            # What follows errCtx quotes the query, and so the text of memories.
            reason = str(error).partition(" errCtx")[0][:200]
            if "unknown command" in reason:
                hint = f"without FalkorDB's graph module; check {name}_PORT"
                raise Unavailable(f"{database.address} is a server {hint}") from error
            raise Rejected(
                f"{PRODUCTS[name]} at {database.address} returned an error: {reason}"
            ) from error

    async def is_durable(self) -> bool:
        """Return whether the database writes each change to disk."""
        async with self.connected() as client:
            return bool((await client.info("persistence"))["aof_enabled"])

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()
