"""Graphiti's driver and models: writes in one transaction, few retries. Imports Graphiti."""

import json
import re
from typing import Any

import openai
from graphiti_core.cross_encoder.openai_reranker_client import OpenAIRerankerClient
from graphiti_core.driver.falkordb_driver import FalkorDriver, FalkorDriverSession
from graphiti_core.embedder.openai import OpenAIEmbedder, OpenAIEmbedderConfig
from graphiti_core.graph_queries import get_fulltext_indices, get_range_indices
from graphiti_core.llm_client import LLMConfig, OpenAIClient
from graphiti_core.llm_client.client import LLMClient
from graphiti_core.llm_client.errors import RateLimitError
from graphiti_core.llm_client.openai_generic_client import OpenAIGenericClient
from graphiti_core.prompts.models import Message
from pydantic import BaseModel
from redis.exceptions import ConnectionError  # noqa: A004
from tenacity import stop_after_attempt

from lib.memory.graph import Query, Superseded, combine
from lib.memory.settings import Settings

OUTAGES = (
    openai.APIConnectionError,
    openai.RateLimitError,
    openai.AuthenticationError,
    openai.PermissionDeniedError,
    openai.NotFoundError,
    RateLimitError,
)
"""Errors that are not due to the memory: no connection, rate limit, wrong key, no such model."""

AMBIGUOUS = (
    openai.APITimeoutError,
    openai.InternalServerError,
    openai.BadRequestError,
    openai.UnprocessableEntityError,
)
"""Errors of a model that is down, of a setting that it refuses, or due to this memory."""

OWN_STOP_WORDS = """
CALL db.indexes() YIELD label, types, stopwords, entitytype
WHERE entitytype = 'NODE' AND size(stopwords) > 0 RETURN label, types
"""

# OpenAI's client retries as Retry-After says, and the queue retries after it. Graphiti's own
# retries between the two would sleep for up to two minutes each, and have no public setting.
LLMClient._generate_response_with_retry.retry.stop = stop_after_attempt(1)  # noqa: SLF001


class Session(FalkorDriverSession):  # type: ignore[misc]
    """Collects the writes of one function of Graphiti and sends them as one query."""

    def __init__(self, driver: "Driver") -> None:
        super().__init__(None)
        self._driver = driver
        self._queries: list[Query] = []

    async def execute_write(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function that writes, then send what it wrote."""
        result = await func(self, *args, **kwargs)
        await self._driver.transact(self._queries)
        return result

    async def run(self, query: str | list[Query], **kwargs: Any) -> None:
        """Collect a query, or several."""
        self._queries += query if isinstance(query, list) else [(query, kwargs)]


class Driver(FalkorDriver):  # type: ignore[misc]
    """Graphiti's driver of one graph; each write starts with ``fence`` and needs its match."""

    fence: Query | None = None
    failure: ConnectionError | None = None
    """The first lost connection; Graphiti may go on after it and raise a later one."""

    async def execute_query(self, cypher_query_: str, **kwargs: Any) -> Any:
        """Run a query and keep its failure."""
        try:
            return await super().execute_query(cypher_query_, **kwargs)
        except ConnectionError as error:
            self.failure = self.failure or error
            raise

    def session(self, database: str | None = None) -> Session:  # noqa: ARG002 -- Graphiti's interface
        """Return a session; the driver has only one graph."""
        return Session(self)

    async def build_indices_and_constraints(self, delete_existing: bool = False) -> None:  # noqa: ARG002, FBT001, FBT002 -- Graphiti's interface
        """Create the indices without Graphiti's stop words; drop those that have them.

        With them, ``n.name IN ['Will']`` crashes FalkorDB: see docs/memory.md.
        """
        rows, _, _ = await self.execute_query(OWN_STOP_WORDS)
        for row in rows:
            label = row["label"]
            await self.execute_query(f"CALL db.idx.fulltext.drop('{label}')")
            # The stop words stay as long as the label has any index.
            for name, kinds in row["types"].items():
                if "RANGE" in kinds:
                    await self.execute_query(f"DROP INDEX FOR (n:{label}) ON (n.{name})")
        for query in get_range_indices(self.provider) + get_fulltext_indices(self.provider):
            await self.execute_query(query.partition("OPTIONS")[0])

    def build_fulltext_query(
        self,
        query: str,
        group_ids: list[str] | None = None,  # noqa: ARG002 -- a graph has one group
        max_query_length: int = 128,
    ) -> str:
        """Return RediSearch's query for any of the words; ``_`` alone is a syntax error there."""
        words = re.findall(r"\w*[^\W_]\w*", query)
        return f"({' | '.join(words[:max_query_length])})" if words else ""

    async def transact(self, queries: list[Query]) -> None:
        """Run queries as one. Raises Superseded when the fence matches nothing."""
        query, params = combine(queries, *(self.fence or ()))
        rows, _, _ = await self.execute_query(query, **params)
        if not rows:
            raise Superseded


class Ping(BaseModel):
    """The answer to a request that only tests the model."""

    ok: bool


class Bounded(LLMClient):  # type: ignore[misc]
    """Keeps Graphiti's own requests for longer answers within ``max_tokens``."""

    async def generate_response(
        self, *args: Any, max_tokens: int | None = None, **kwargs: Any
    ) -> Any:
        """Ask the model."""
        limit = min(max_tokens or self.max_tokens, self.max_tokens)
        return await super().generate_response(*args, max_tokens=limit, **kwargs)


class ResponsesClient(Bounded, OpenAIClient):  # type: ignore[misc]
    """Graphiti's client of OpenAI."""


class GenericClient(Bounded, OpenAIGenericClient):  # type: ignore[misc]
    """Graphiti's client of compatible servers, for models that add to the JSON they return."""

    @staticmethod
    def _strip_code_fences(text: str) -> str:
        """Return the first JSON object or array after a model's thoughts, without prose."""
        answer = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
        for start in re.finditer(r"[{\[]", answer):
            try:
                _, end = json.JSONDecoder().raw_decode(answer, start.start())
            except ValueError:
                continue
            return answer[start.start() : end]
        return answer


class Model:
    """The language model, the embedder, and the reranker, which Graphiti requires."""

    def __init__(self, settings: Settings) -> None:
        openai_key = settings.openai.api_key or "none"
        openai_url = settings.openai.base_url or None
        timeout = settings.timeout
        self._client = openai.AsyncOpenAI(
            api_key=openai_key,
            base_url=openai_url,
            timeout=timeout,
        )
        embedding_client = openai.AsyncOpenAI(
            api_key=settings.embedding_api_key or openai_key,
            base_url=settings.embedding_base_url or openai_url,
            timeout=timeout,
        )
        small_model = settings.small_model or settings.model or None
        config = LLMConfig(
            openai_key,
            settings.model or None,
            openai_url,
            small_model=small_model,
            max_tokens=settings.max_tokens,
        )
        if settings.api == "responses":
            self.llm = ResponsesClient(config, client=self._client)
        else:
            mode = "json_object" if settings.api == "json" else "json_schema"
            self.llm = GenericClient(
                config,
                client=self._client,
                max_tokens=settings.max_tokens,
                structured_output_mode=mode,
            )
        embedding = OpenAIEmbedderConfig(
            embedding_model=settings.embedding_model, embedding_dim=settings.embedding_dim
        )
        self.embedder = OpenAIEmbedder(embedding, embedding_client)
        self.reranker = OpenAIRerankerClient(config, client=self._client)

    async def ping(self) -> None:
        """Send a small request to the embedder and to the model, like those for a memory."""
        await self.embedder.create(input_data=["ok"])
        messages = [
            Message(role="system", content="You answer with JSON."),
            Message(role="user", content='Answer {"ok": true}.'),
        ]
        await self.llm.generate_response(messages, response_model=Ping)
