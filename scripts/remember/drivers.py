"""Graphiti's parts as this memory needs them: writes in one transaction, models that fail soon. Imports Graphiti."""

from __future__ import annotations

from typing import Any

import openai
from graphiti_core.cross_encoder.openai_reranker_client import OpenAIRerankerClient
from graphiti_core.driver.falkordb_driver import FalkorDriver, FalkorDriverSession
from graphiti_core.embedder.openai import OpenAIEmbedder, OpenAIEmbedderConfig
from graphiti_core.llm_client import LLMConfig, OpenAIClient
from graphiti_core.llm_client.client import LLMClient
from graphiti_core.llm_client.errors import RateLimitError
from graphiti_core.llm_client.openai_generic_client import OpenAIGenericClient
from redis.exceptions import ConnectionError, OutOfMemoryError, ReadOnlyError, TimeoutError  # noqa: A004
from tenacity import stop_after_attempt

from .graph import Query, Superseded, as_one
from .settings import Settings, Unavailable

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


class Session(FalkorDriverSession):  # type: ignore[misc]
    """A session whose writes are collected, and sent as one when the function that makes them ends."""

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
    """Graphiti's driver of one graph. ``fence`` begins what is written: where it finds nothing, nothing is."""

    def __init__(self, client: Any, graph: str) -> None:
        super().__init__(falkor_db=client, database=graph)
        self.fence: Query | None = None

    def session(self, database: str | None = None) -> Session:
        """Return a session; a driver has one graph only."""
        assert database in (None, self._database)  # noqa: S101 -- Graphiti asks for no other
        return Session(self)

    async def transact(self, queries: list[Query]) -> None:
        """Run queries as one. Raises Superseded when the fence finds nothing."""
        query, params = as_one(queries, *(self.fence or ()))
        if not (await self.execute_query(query, **params))[0]:
            raise Superseded


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
