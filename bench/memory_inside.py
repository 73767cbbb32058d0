"""Measure the memory and graphiti-core; ``memory.py`` runs this with the image's packages.

Usage: memory_inside.py SCRIPTS COUNT...; it prints ours and theirs of each benchmark as JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SCRIPTS = Path(sys.argv[1])
sys.path.insert(0, str(SCRIPTS))

from lib.memory.service import Memories, make_memory  # noqa: E402
from lib.memory.settings import read_settings  # noqa: E402

ADDS, INGESTS, SEARCHES, STARTS = 2000, 20, 15, 5
BATCH = 2000
QUERY = "who met Place7 in chapter 7"
FACTS = """
UNWIND range($since, $until) AS i
MERGE (a:Entity {uuid: 'a' + toString(i % 997)})
SET a.name = 'Person' + toString(i % 997), a.group_id = $group
MERGE (b:Entity {uuid: 'b' + toString(i % 983)})
SET b.name = 'Place' + toString(i % 983), b.group_id = $group
CREATE (a)-[:RELATES_TO {
  uuid: 'f' + toString(i), group_id: $group, name: 'MET', episodes: [], created_at: $now,
  fact: 'Person' + toString(i % 997) + ' met Place' + toString(i % 983)
    + ' in chapter ' + toString(i),
  fact_embedding: vecf32([x IN range(1, 1024) | rand() - 0.5])
}]->(b)
"""
NAIVE = """
import graphiti_core, graphiti_core.driver.falkordb_driver
from mcp.server import MCPServer
server = MCPServer("memory")
@server.tool()
def add(text: str) -> str:
    return text
server.run()
"""
GREETING = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "bench", "version": "1"},
    },
}


async def median(count: int, work: Callable[[], Awaitable[Any]]) -> float:
    """Return the median milliseconds of ``work``, after one call that does not count."""
    await work()
    took = []
    for _ in range(count):
        began = time.perf_counter()
        await work()
        took.append((time.perf_counter() - began) * 1000)
    return statistics.median(took)


def greet_often(*argv: str) -> tuple[float, float]:
    """Return the medians of ``greet``."""
    times, sizes = zip(*(greet(*argv) for _ in range(STARTS)), strict=True)
    return statistics.median(times), statistics.median(sizes)


def greet(*argv: str) -> tuple[float, float]:
    """Start an MCP server; return the ms until it answers ``initialize``, and its MB then."""
    began = time.perf_counter()
    request = json.dumps(GREETING) + "\n"
    command = [sys.executable, "-I", *argv]
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=quiet, text=True) as child:
        if child.stdin and child.stdout:
            child.stdin.write(request)
            child.stdin.flush()
            child.stdout.readline()
        took = (time.perf_counter() - began) * 1000
        status = Path(f"/proc/{child.pid}/status").read_text()
        child.kill()
    return took, int(status.partition("VmRSS:")[2].split()[0]) / 1000


def stock(memories: Memories, project: str) -> Any:
    """Return Graphiti as its own documentation sets it up, on the same database and models."""
    from graphiti_core import Graphiti
    from graphiti_core.driver.falkordb_driver import FalkorDriver

    model = memories.graph._model  # noqa: SLF001 -- the same clients are what makes it a comparison
    driver = FalkorDriver(falkor_db=memories.graph._db, database=project)  # noqa: SLF001
    return Graphiti(
        graph_driver=driver,
        llm_client=model.llm,
        embedder=model.embedder,
        cross_encoder=model.reranker,
    )


async def main() -> dict[str, tuple[float, float]]:
    """Measure one thing after the other; return ours and theirs, in ms or MB."""
    ours = greet_often(str(SCRIPTS / "memory"), "serve")
    theirs = greet_often("-c", NAIVE)
    found = {"initialize": (ours[0], theirs[0]), "megabytes": (ours[1], theirs[1])}
    memories = Memories(read_settings())
    numbers = itertools.count()

    def sentence() -> str:
        return f"Person{next(numbers)} met Place{next(numbers)}."

    began = time.perf_counter()
    for _ in range(ADDS):
        await memories.add(make_memory(sentence()))
    added = (time.perf_counter() - began) * 1000 / ADDS
    await memories.queue.forget_project(memories.project)

    graph = memories.graph
    await graph.project("ours")
    plain = stock(memories, "theirs")
    await plain.build_indices_and_constraints()

    async def ingest() -> None:
        await graph.ingest("ours", make_memory(sentence()))

    async def add_episode() -> None:
        name, now = str(uuid.uuid4()), datetime.now(UTC)
        await plain.add_episode(name, sentence(), "", now, group_id="theirs")

    found["ingest"] = (await median(INGESTS, ingest), await median(INGESTS, add_episode))
    found["add"] = (added, found["ingest"][1])
    for count in map(int, sys.argv[2:]):
        found[f"search {count}"] = await searches(memories, count)
    await memories.close()
    return found


async def searches(memories: Memories, count: int) -> tuple[float, float]:
    """Return the times of our search and Graphiti's among ``count`` facts."""
    project, graph = f"facts{count}", memories.graph
    await graph.project(project)
    now = datetime.now(UTC).isoformat()
    for since in range(0, count, BATCH):
        until = min(count, since + BATCH) - 1
        await graph.query(project, FACTS, group=project, since=since, until=until, now=now)
    plain = stock(memories, project)

    async def ours() -> None:
        await graph.search(project, QUERY, 10, entities=False)

    async def theirs() -> None:
        await plain.search(QUERY, group_ids=[project])

    return await median(SEARCHES, ours), await median(SEARCHES, theirs)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main())))
