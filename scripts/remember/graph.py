"""The memory itself: Graphiti on FalkorDB, one graph a project, imported when the first of them is opened."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from . import observe
from .queue import Memory
from .settings import Settings, Unavailable

CONTEXT = 10
"""How many earlier memories Graphiti shows the model beside a new one; it is its own default too."""
GRAPH_SECONDS = 120.0
EMBED_SECONDS = 10.0

# An episode is in the graph, marked as pending, before the model is asked about it; Graphiti's own write at the end
# replaces all of its properties, and so takes the mark and the claim away in the same transaction as it adds the rest.
CLAIM = """
MERGE (e:Episodic {uuid: $id})
ON CREATE SET e.pending = true, e.name = $name, e.group_id = $group, e.source = 'text', e.source_description = $about,
    e.content = $text, e.entity_edges = [], e.created_at = $at, e.valid_at = $at
WITH e WHERE e.pending
SET e.claim = $claim
RETURN e.uuid
"""
CLAIMED = "MATCH (claimed:Episodic {uuid: $id, claim: $claim}) WITH 1 AS held"
RECENT = """
MATCH (e:Episodic) WHERE NOT coalesce(e.pending, false) RETURN e.uuid ORDER BY e.valid_at DESC LIMIT $limit
"""
EPISODES = """
MATCH (e:Episodic) RETURN e.uuid, e.content, e.valid_at, e.source_description, coalesce(e.pending, false)
ORDER BY e.valid_at DESC SKIP $skip LIMIT $limit
"""
COUNTS = """
OPTIONAL MATCH (e:Episodic) WITH count(e) AS memories
OPTIONAL MATCH (n:Entity) WITH memories, count(n) AS entities
OPTIONAL MATCH (:Entity)-[r:RELATES_TO]->(:Entity) RETURN memories, entities, count(r)
"""
# What only this memory says goes with it. A fact that others say too keeps them as its sources.
FORGET = (
    """
MATCH (e:Episodic {uuid: $id}) UNWIND e.entity_edges AS fact
MATCH (:Entity)-[r:RELATES_TO {uuid: fact}]->(:Entity) WHERE r.episodes = [$id] DELETE r
""",
    """
MATCH (e:Episodic {uuid: $id}) UNWIND e.entity_edges AS fact
MATCH (:Entity)-[r:RELATES_TO {uuid: fact}]->(:Entity) WHERE $id IN r.episodes
SET r.episodes = [source IN r.episodes WHERE source <> $id]
""",
    """
MATCH (e:Episodic {uuid: $id})-[:MENTIONS]->(n:Entity)
OPTIONAL MATCH (other:Episodic)-[:MENTIONS]->(n) WHERE other.uuid <> $id
WITH n, count(other) AS others WHERE others = 0
DETACH DELETE n
""",
    "MATCH (e:Episodic {uuid: $id}) DETACH DELETE e",
)
FORGET_FACT = "MATCH (:Entity)-[r:RELATES_TO {uuid: $id}]->(:Entity) DELETE r RETURN count(r)"
FORGET_ENTITY = "MATCH (n:Entity {uuid: $id}) DETACH DELETE n RETURN count(n)"


Query = tuple[str, dict[str, Any]]


def as_one(queries: Sequence[Query], fence: str = "WITH 1 AS held", params: Mapping[str, Any] = {}) -> Query:
    """Return one query of several: FalkorDB takes it whole or not at all, and logs it whole; done, it has a row.

    ``fence`` begins it: where that finds nothing, nothing is done. (MULTI would be whole too, but a server that loads
    MULTI from its append-only file ends itself when a client connects meanwhile: seen with FalkorDB 4.16.3.)
    """
    whole, given = fence, dict(params)
    for number, (query, values) in enumerate(queries):
        inner = re.sub(r"\$(\w+)", rf"$q{number}_\1", re.sub(r"\bRETURN [^{}]*\Z", "", query))
        whole += f"\nCALL {{ {inner} RETURN count(*) AS c{number} }}"
        given |= {f"q{number}_{name}": value for name, value in values.items()}
    return f"{whole}\nRETURN 1", given


class Superseded(Exception):
    """Somebody else digests this memory now, or it was forgotten meanwhile: nothing was written."""


class Graph:
    """All projects' graphs. What asks FalkorDB raises Unavailable when it does not answer."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._db: Any = None
        self._model: Any = None
        self._open: dict[str, Any] = {}
        self._opening = asyncio.Lock()
        self._digesting: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def connect(self) -> Any:
        """Return the client of FalkorDB, without importing Graphiti."""
        if self._db is None:

            def build() -> Any:
                from falkordb.asyncio import FalkorDB

                return FalkorDB(**self.settings.falkordb.options(GRAPH_SECONDS))  # asks the server, blocking

            with self._answering():
                self._db = await asyncio.to_thread(build)
        return self._db

    @contextlib.contextmanager
    def _answering(self) -> Any:
        from redis.exceptions import AuthenticationError, BusyLoadingError, ConnectionError, TimeoutError  # noqa: A004

        try:
            yield
        except (AuthenticationError, BusyLoadingError, ConnectionError, TimeoutError, OSError) as error:
            raise self.settings.falkordb.missing(error) from error

    async def ask(self, project: str, query: str, **params: Any) -> list[list[Any]]:
        """Run a query and return its rows; a graph that is not there has none, and is not made by being asked."""
        db = await self.connect()
        with self._answering():
            if not await db.connection.exists(project):
                return []
            return list((await db.select_graph(project).query(query, params)).result_set)

    async def keeps(self) -> bool:
        """Say whether FalkorDB writes each change to its disk."""
        db = await self.connect()
        with self._answering():
            return bool((await db.connection.info("persistence"))["aof_enabled"])

    async def project(self, name: str) -> Any:
        """Return Graphiti for a project; the first call imports it, which takes a second or two, in a thread."""
        db = await self.connect()
        async with self._opening:
            with self._answering():
                there = await db.connection.exists(name)
            if name not in self._open or not there:  # its indices go with a graph that is deleted
                # In a thread no loop runs: with one, the driver would make a task of its own that builds indices.
                graphiti = await asyncio.to_thread(self._build, db, name)
                with self._answering():
                    await graphiti.driver.build_indices_and_constraints()
                self._open[name] = graphiti
        return self._open[name]

    def _build(self, db: Any, name: str) -> Any:
        os.environ["GRAPHITI_TELEMETRY_ENABLED"] = "false"
        os.environ["EMBEDDING_DIM"] = str(self.settings.embedding_dim)
        observe.start()
        logging.getLogger("graphiti_core").setLevel(logging.CRITICAL + 1)  # it logs what is remembered
        from graphiti_core import Graphiti

        from . import drivers

        model = self._model = self._model or drivers.Model(self.settings)
        return Graphiti(
            graph_driver=drivers.Driver(db, name),
            llm_client=model.llm,
            embedder=model.embedder,
            cross_encoder=model.reranker,
            max_coroutines=self.settings.concurrency,
        )

    async def model_answers(self) -> bool:
        """Ask the model and the embedder for one word each: whether it is them or a memory that is at fault."""
        try:
            await self._model.ping()
        except Exception:  # noqa: BLE001 -- whatever it is, it does not answer
            return False
        return True

    async def digest(self, project: str, memory: Memory) -> bool:
        """Put a memory into the graph, whole or not at all; return False when it already was there.

        Raises Superseded, Unavailable, and what the model's client raises.
        """
        self.settings.need_model()
        graphiti = await self.project(project)
        claim = secrets.token_hex(8)
        text = memory.text.replace("\0", "")
        name = " ".join(text.split())[:80]
        async with self._digesting[project]:
            with observe.span("digest", project), self._answering():
                rows = await self.ask(
                    project, CLAIM, id=memory.id, group=project, claim=claim, name=name, text=text, at=memory.at,
                    about=memory.about.replace("\0", ""),
                )  # fmt: skip
                if not rows:
                    return False
                earlier = [row[0] for row in await self.ask(project, RECENT, limit=CONTEXT)]
                from datetime import datetime

                from graphiti_core.nodes import EpisodeType

                graphiti.driver.fence = (CLAIMED, {"id": memory.id, "claim": claim})
                try:
                    await graphiti.add_episode(
                        name=name, episode_body=text, source_description=memory.about, source=EpisodeType.text,
                        reference_time=datetime.fromisoformat(memory.at), group_id=project, uuid=memory.id,
                        previous_episode_uuids=earlier,
                    )  # fmt: skip
                finally:
                    graphiti.driver.fence = None
        return True

    async def search(self, project: str, query: str, limit: int, *, entities: bool) -> tuple[list[dict[str, Any]], str]:
        """Return the facts, or the entities, that fit best, and why only by their words when it is so."""
        graphiti = await self.project(project)
        from graphiti_core.search import search_config_recipes as recipes
        from graphiti_core.search.search_config import EdgeSearchMethod, NodeSearchMethod

        config = (recipes.NODE_HYBRID_SEARCH_RRF if entities else recipes.EDGE_HYBRID_SEARCH_RRF).model_copy(deep=True)
        config.limit = limit
        vector, why = None, ""
        try:
            self.settings.need_model()
            embedding = graphiti.embedder.create(input_data=[query.replace("\n", " ")])
            vector = await asyncio.wait_for(embedding, EMBED_SECONDS)
        except Unavailable as error:
            why = str(error)
        except Exception as error:  # noqa: BLE001 -- words alone are better than nothing, whatever it was
            why = f"the embedding model does not answer ({type(error).__name__})"
        if vector is None:
            part, words = (config.node_config, NodeSearchMethod) if entities else (config.edge_config, EdgeSearchMethod)
            part.search_methods = [words.bm25]
        with observe.span("search", project), self._answering():
            found = await graphiti.search_(query, config, group_ids=[project], query_vector=vector)
        if entities:
            return [{"id": node.uuid, "name": node.name, "summary": node.summary} for node in found.nodes], why
        return [
            {
                "id": edge.uuid,
                "fact": edge.fact,
                "since": edge.valid_at and edge.valid_at.isoformat(),
                "until": edge.invalid_at and edge.invalid_at.isoformat(),
                "memories": edge.episodes,
            }
            for edge in found.edges
        ], why

    async def episodes(self, project: str, limit: int, skip: int = 0) -> list[dict[str, Any]]:
        """Return the memories in the graph, newest first."""
        rows = await self.ask(project, EPISODES, limit=limit, skip=skip)
        return [
            {"id": uuid, "text": text, "at": at, "about": about, "state": "being digested" if pending else "digested"}
            for uuid, text, at, about, pending in rows
        ]

    async def counts(self, project: str) -> dict[str, int]:
        """Return how many memories, entities and facts a project has."""
        rows = await self.ask(project, COUNTS) or [[0, 0, 0]]
        return dict(zip(("memories", "entities", "facts"), rows[0], strict=True))

    async def forget(self, project: str, uuid: str) -> str:
        """Remove a memory with what only it says, or a fact, or an entity; return which it was, "" when it is none."""
        if await self.ask(project, "MATCH (e:Episodic {uuid: $id}) RETURN e.uuid", id=uuid):
            query, params = as_one([(query, {"id": uuid}) for query in FORGET])
            await self.ask(project, query, **params)
            return "memory"
        for query, what in ((FORGET_FACT, "fact"), (FORGET_ENTITY, "entity")):
            if (rows := await self.ask(project, query, id=uuid)) and rows[0][0]:
                return what
        return ""

    async def forget_project(self, project: str) -> bool:
        """Delete a project's graph; return whether there was one."""
        db = await self.connect()
        with self._answering():
            return bool(await db.connection.delete(project))

    async def close(self) -> None:
        """Close the connections."""
        if self._db is not None:
            await self._db.connection.aclose()
