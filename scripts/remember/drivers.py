"""Graphiti's parts as this memory needs them: writes in one transaction, models that fail soon. Imports Graphiti."""

from __future__ import annotations

from typing import Any

import openai
from falkordb.helpers import stringify_param_value
from graphiti_core.cross_encoder.openai_reranker_client import OpenAIRerankerClient
from graphiti_core.driver.falkordb_driver import FalkorDriver, FalkorDriverSession
from graphiti_core.embedder.openai import OpenAIEmbedder, OpenAIEmbedderConfig
from graphiti_core.llm_client import LLMConfig, OpenAIClient
from graphiti_core.llm_client.client import LLMClient
from graphiti_core.llm_client.errors import RateLimitError
from graphiti_core.llm_client.openai_generic_client import OpenAIGenericClient
from redis.exceptions import ConnectionError, OutOfMemoryError, ReadOnlyError, ResponseError, TimeoutError, WatchError  # noqa: A004
from tenacity import stop_after_attempt

from .graph import Superseded
from .settings import Settings, Unavailable

Query = tuple[str, dict[str, Any]]

REFUSED = (
    openai.APIConnectionError, openai.RateLimitError, openai.AuthenticationError, openai.PermissionDeniedError,
    openai.NotFoundError, RateLimitError, ConnectionError, TimeoutError, OutOfMemoryError, ReadOnlyError, Unavailable,
)  # fmt: skip
"""Failures that say nothing of the memory: nobody answers, not now, not for this key, or there is no such model."""

DOUBTFUL = (openai.APITimeoutError, openai.InternalServerError)
"""Failures of a model that is down, or that this memory brings down."""

# The client of OpenAI tries again by itself, as the answer's Retry-After says, and the queue does after it. Graphiti's
# own tries between the two would sleep for up to two minutes each.
LLMClient._generate_response_with_retry.retry.stop = stop_after_attempt(1)  # noqa: SLF001 -- it has no other name


class Torn(Exception):
    """A query of a transaction failed, and those beside it did not: FalkorDB rolls nothing back. Holds the failure."""


class Session(FalkorDriverSession):  # type: ignore[misc]
    """A session whose writes are collected, and sent together when the function that makes them ends."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(None)
        self._driver = driver
        self._queries: list[Query] = []

    async def execute_write(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Run Graphiti's function of writes, then send what it wrote."""
        result = await func(self, *args, **kwargs)
        await self._driver.transact(self._queries)
        return result

    async def run(self, query: str | list[Query], **kwargs: Any) -> None:
        """Collect a query, or several."""
        self._queries += query if isinstance(query, list) else [(query, kwargs)]


class Driver(FalkorDriver):  # type: ignore[misc]
    """Graphiti's driver of one graph. ``fence`` is a query that must still find something when writes are sent."""

    Torn = Torn

    def __init__(self, client: Any, graph: str) -> None:
        super().__init__(falkor_db=client, database=graph)
        self.fence: Query | None = None

    def session(self, database: str | None = None) -> Session:
        """Return a session; a driver has one graph only."""
        assert database in (None, self._database)  # noqa: S101 -- Graphiti asks for no other
        return Session(self)

    def _command(self, query: str, params: dict[str, Any], verb: str = "GRAPH.QUERY") -> tuple[str, str, str]:
        given = self.convert_datetimes_to_strings(params)
        header = " ".join(f"{name}={stringify_param_value(value)}" for name, value in given.items())
        return verb, self._database, f"CYPHER {header} {query}".replace("\0", "")

    async def transact(self, queries: list[Query]) -> None:
        """Send queries as one transaction: all of them are in the graph, and in its append-only file, or none.

        Raises Superseded when the fence finds nothing; another write between it and the transaction is noticed.
        """
        async with self.client.connection.pipeline(transaction=True) as pipe:
            while True:
                try:
                    if self.fence:
                        await pipe.watch(self._database)
                        if not (await pipe.execute_command(*self._command(*self.fence, "GRAPH.RO_QUERY")))[1]:
                            raise Superseded
                    pipe.multi()
                    for query, params in queries:
                        pipe.execute_command(*self._command(str(query), params))
                    await pipe.execute()
                except WatchError:
                    continue
                except ResponseError as error:
                    raise Torn(error) from error
                return


class Model:
    """The language model, the embedder and the reranker (which RRF searches never call), as the settings say."""

    def __init__(self, settings: Settings) -> None:
        def client(key: str, url: str | None) -> Any:
            return openai.AsyncOpenAI(api_key=key or "none", base_url=url, timeout=settings.timeout, max_retries=2)

        self._client = client(settings.api_key, settings.base_url)
        config = LLMConfig(
            settings.api_key or "none", settings.model, settings.base_url, small_model=settings.small_model
        )
        if settings.api == "responses":
            self.llm = OpenAIClient(config, client=self._client)
        else:
            mode = "json_object" if settings.api == "json" else "json_schema"
            self.llm = OpenAIGenericClient(config, client=self._client, structured_output_mode=mode)
        embedding = OpenAIEmbedderConfig(embedding_model=settings.embedding_model, embedding_dim=settings.embedding_dim)
        self.embedder = OpenAIEmbedder(embedding, client(settings.embedding_key, settings.embedding_url))
        self.reranker = OpenAIRerankerClient(config, client=self._client)

    async def ping(self) -> None:
        """Ask each for something small."""
        await self.embedder.create(input_data=["ok"])
        messages = [{"role": "user", "content": "Say ok."}]
        model = self.llm.model or "gpt-4.1-mini"
        await self._client.chat.completions.create(model=model, messages=messages)
