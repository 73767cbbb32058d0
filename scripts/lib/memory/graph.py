"""The graphs: Graphiti on FalkorDB, one graph for each project. Imports Graphiti when needed."""

import asyncio
import logging
import os
import re
import secrets
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from lib.memory import spans
from lib.memory.connection import Connection
from lib.memory.queue import Memory
from lib.memory.settings import Settings, Unavailable

CONTEXT = 10
"""How many earlier memories Graphiti shows the model with a new one: its own default."""
GRAPH_SECONDS = 120.0
EMBED_SECONDS = 10.0

# An episode is written, marked as pending, before the model is asked. Graphiti's write at the end
# replaces all its properties: that removes mark and claim in the transaction that adds the rest.
CLAIM = """
MERGE (e:Episodic {uuid: $id})
ON CREATE SET e.pending = true, e.name = $name, e.group_id = $group, e.source = 'text',
    e.source_description = $about, e.content = $text, e.entity_edges = [],
    e.created_at = $at, e.valid_at = $at
WITH e WHERE e.pending
SET e.claim = $claim
RETURN e.uuid
"""
CLAIMED = "MATCH (claimed:Episodic {uuid: $id, claim: $claim}) WITH 1 AS held"
HAS = "MATCH (e:Episodic {uuid: $id}) WHERE NOT coalesce(e.pending, false) RETURN 1"
RECENT = """
MATCH (e:Episodic) WHERE NOT coalesce(e.pending, false)
RETURN e.uuid ORDER BY e.valid_at DESC LIMIT $limit
"""
EPISODES = """
MATCH (e:Episodic)
RETURN e.uuid, e.content, e.valid_at, e.source_description, coalesce(e.pending, false)
ORDER BY e.valid_at DESC LIMIT $limit
"""
COUNTS = """
OPTIONAL MATCH (e:Episodic) WITH count(e) AS memories
OPTIONAL MATCH (n:Entity) WITH memories, count(n) AS entities
OPTIONAL MATCH (:Entity)-[r:RELATES_TO]->(:Entity) RETURN memories, entities, count(r)
"""
# A summary may repeat what is forgotten: it becomes the facts that are left.
SUMMARIZE = """
OPTIONAL MATCH (n)-[left:RELATES_TO]-(:Entity)
WITH n, collect(DISTINCT left.fact) AS facts
SET n.summary = reduce(text = '', fact IN facts | text + fact + ' ')
"""
# Deletes what only this memory says. A fact that other memories say too keeps those as sources.
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
    "MATCH (e:Episodic {uuid: $id})-[:MENTIONS]->(n:Entity)" + SUMMARIZE,
    "MATCH (e:Episodic {uuid: $id}) DETACH DELETE e",
)
FORGET_FACT = """
MATCH (a:Entity)-[r:RELATES_TO {uuid: $id}]->(b:Entity) UNWIND [a, b] AS n
OPTIONAL MATCH (n)-[left:RELATES_TO]-(:Entity) WHERE left.uuid <> $id
WITH n, r, collect(DISTINCT left.fact) AS facts
SET n.summary = reduce(text = '', fact IN facts | text + fact + ' ')
WITH DISTINCT r DELETE r RETURN count(r)
"""
FORGET_ENTITY = "MATCH (n:Entity {uuid: $id}) DETACH DELETE n RETURN count(n)"


Query = tuple[str, dict[str, Any]]


class Superseded(Exception):
    """Another worker ingests this memory, or it was forgotten: nothing was written."""


def combine(queries: Sequence[Query], fence: str = "WITH 1 AS held", params: Any = ()) -> Query:
    """Return one query of several: FalkorDB runs and logs it as a whole. It returns a row.

    Where ``fence`` matches nothing, nothing is done and no row returned. MULTI would be atomic too,
    but FalkorDB 4.16.3 exits when a client connects while it loads MULTI from its append-only file.
    """
    combined = fence
    values = dict(params)
    for number, (query, arguments) in enumerate(queries):
        body = re.sub(r"\bRETURN [^{}]*\Z", "", query)
        body = re.sub(r"\$(\w+)", rf"$q{number}_\1", body)
        combined += f"\nCALL {{ {body} RETURN count(*) AS c{number} }}"
        for name, value in arguments.items():
            values[f"q{number}_{name}"] = value
    return f"{combined}\nRETURN 1", values


class Graph(Connection):
    """The graphs of all projects."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.falkordb, GRAPH_SECONDS)
        self.settings = settings
        self._db: Any = None
        self._model: Any = None
        self._projects: dict[str, Any] = {}
        self._opening = asyncio.Lock()
        self._ingesting: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def _connect(self) -> Any:
        """Return FalkorDB's client; blocks, since it asks whether the server is a cluster."""
        from falkordb.asyncio import FalkorDB

        if self._db is None:
            self._db = FalkorDB(connection_pool=self._client.connection_pool)
        return self._db

    async def query(self, project: str, query: str, **params: Any) -> list[list[Any]]:
        """Run a query and return its rows; does not create a graph that does not exist."""
        async with self.connected() as client:
            if not await client.exists(project):
                return []
            db = await asyncio.to_thread(self._connect)
            result = await db.select_graph(project).query(query, params)
            return list(result.result_set)

    async def project(self, name: str) -> Any:
        """Return Graphiti for a project; the first call imports it, for a second or two."""
        async with self._opening, self.connected() as client:
            if name not in self._projects or not await client.exists(name):
                # In a thread: inside an event loop the driver starts to build indices on its own.
                graphiti = await asyncio.to_thread(self._build, name)
                await graphiti.driver.build_indices_and_constraints()
                self._projects[name] = graphiti
        return self._projects[name]

    def _build(self, name: str) -> Any:
        os.environ["GRAPHITI_TELEMETRY_ENABLED"] = "false"
        os.environ["EMBEDDING_DIM"] = str(self.settings.embedding_dim)
        spans.start()
        db = self._connect()
        db.execute_command = db.connection.execute_command  # bound before it was traced
        # Graphiti logs queries with the text of memories.
        logging.getLogger("graphiti_core").setLevel(logging.CRITICAL + 1)
        from graphiti_core import Graphiti

        from lib.memory.drivers import Driver, Model

        self._model = self._model or Model(self.settings)
        return Graphiti(
            graph_driver=Driver(falkor_db=db, database=name),
            llm_client=self._model.llm,
            embedder=self._model.embedder,
            cross_encoder=self._model.reranker,
            max_coroutines=self.settings.concurrency,
        )

    async def is_healthy(self) -> bool:
        """Return whether FalkorDB, the model and the embedder process a small request."""
        try:
            async with self.connected() as client:
                await client.set("memory:ping", 1, ex=60)
            await self._model.ping()
        except Exception:  # noqa: BLE001 -- whatever fails, it is not healthy
            return False
        return True

    async def ingest(self, project: str, memory: Memory) -> bool:
        """Add a memory to the graph, whole or not at all; return False when it is there.

        Raises Superseded, Unavailable, and the errors of the model's client.
        """
        self.settings.require_model()
        graphiti = await self.project(project)
        from graphiti_core.nodes import EpisodeType

        text = memory.text.replace("\0", "")
        name = " ".join(text.split())[:80]
        about = memory.about.replace("\0", "")
        claim = {"id": memory.id, "claim": secrets.token_hex(8)}
        values = {
            "group": project,
            "name": name,
            "text": text,
            "at": memory.at,
            "about": about,
        }
        async with self._ingesting[project]:
            with spans.span("ingest", project):
                if not await self.query(project, CLAIM, **claim, **values):
                    return False
                recent = await self.query(project, RECENT, limit=CONTEXT)
                driver = graphiti.driver
                driver.fence, driver.failure = (CLAIMED, claim), None
                async with self.connected():
                    try:
                        await graphiti.add_episode(
                            name=name,
                            episode_body=text,
                            source_description=about,
                            reference_time=datetime.fromisoformat(memory.at),
                            source=EpisodeType.text,
                            group_id=project,
                            uuid=memory.id,
                            previous_episode_uuids=[row[0] for row in recent],
                        )
                    except Exception as error:
                        raise driver.failure or error from error
                    finally:
                        driver.fence = None
        return True

    async def search(
        self, project: str, query: str, limit: int, *, entities: bool
    ) -> tuple[list[dict[str, Any]], str]:
        """Return the best facts or entities, and why the search was by words alone, if it was."""
        graphiti = await self.project(project)
        from graphiti_core.search.search_config import EdgeSearchMethod, NodeSearchMethod
        from graphiti_core.search.search_config_recipes import (
            EDGE_HYBRID_SEARCH_RRF,
            NODE_HYBRID_SEARCH_RRF,
        )

        recipe = NODE_HYBRID_SEARCH_RRF if entities else EDGE_HYBRID_SEARCH_RRF
        config = recipe.model_copy(deep=True)
        config.limit = limit
        vector, problem = await self._embed(graphiti, query)
        if vector is None and entities:
            config.node_config.search_methods = [NodeSearchMethod.bm25]
        elif vector is None:
            config.edge_config.search_methods = [EdgeSearchMethod.bm25]
        with spans.span("search", project):
            async with self.connected():
                found = await graphiti.search_(
                    query, config, group_ids=[project], query_vector=vector
                )
        if entities:
            return [_entity(node) for node in found.nodes], problem
        return [_fact(edge) for edge in found.edges], problem

    async def _embed(self, graphiti: Any, query: str) -> tuple[Any, str]:
        """Return the vector of a query, or None and the reason."""
        try:
            self.settings.require_model()
            embedding = graphiti.embedder.create(input_data=[query.replace("\n", " ")])
            return await asyncio.wait_for(embedding, EMBED_SECONDS), ""
        except Unavailable as error:
            return None, str(error)
        except Exception as error:  # noqa: BLE001 -- a search by words works without it
            return None, f"the embedding model does not answer ({type(error).__name__})"

    async def episodes(self, project: str, limit: int) -> list[dict[str, Any]]:
        """Return the memories in the graph, newest first."""
        episodes = []
        for uuid, text, at, about, pending in await self.query(project, EPISODES, limit=limit):
            state = "ingesting" if pending else "ingested"
            episodes.append(
                {
                    "id": uuid,
                    "text": text,
                    "at": at,
                    "about": about,
                    "state": state,
                }
            )
        return episodes

    async def counts(self, project: str) -> dict[str, int]:
        """Return the numbers of memories, entities and facts."""
        rows = await self.query(project, COUNTS) or [[0, 0, 0]]
        return dict(
            zip(
                ("memories", "entities", "facts"),
                rows[0],
                strict=True,
            )
        )

    async def has(self, project: str, uuid: str) -> bool:
        """Whether a memory has been ingested."""
        return bool(await self.query(project, HAS, id=uuid))

    async def forget(self, project: str, uuid: str) -> str:
        """Delete a memory with what only it says, or a fact, or an entity.

        Returns "memory", "fact", "entity", or an empty string when nothing has this ID.
        """
        if await self.query(
            project,
            "MATCH (e:Episodic {uuid: $id}) RETURN 1",
            id=uuid,
        ):
            query, params = combine([(query, {"id": uuid}) for query in FORGET])
            await self.query(project, query, **params)
            return "memory"
        for query, kind in ((FORGET_FACT, "fact"), (FORGET_ENTITY, "entity")):
            rows = await self.query(project, query, id=uuid)
            if rows and rows[0][0]:
                return kind
        return ""

    async def forget_project(self, project: str) -> bool:
        """Delete a graph; return False when there was none."""
        async with self.connected() as client:
            return bool(await client.delete(project))


def _entity(node: Any) -> dict[str, Any]:
    return {
        "id": node.uuid,
        "name": node.name,
        "summary": node.summary,
    }


def _fact(edge: Any) -> dict[str, Any]:
    return {
        "id": edge.uuid,
        "fact": edge.fact,
        "since": edge.valid_at and edge.valid_at.isoformat(),
        "until": edge.invalid_at and edge.invalid_at.isoformat(),
        "memories": edge.episodes,
    }
