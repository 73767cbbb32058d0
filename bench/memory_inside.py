"""Run by ``memory.py`` with the image's packages: memory_inside.py SCRIPTS COUNT... prints what it measured as JSON."""

from __future__ import annotations

import asyncio
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

from remember import settings  # noqa: E402
from remember.service import Memories  # noqa: E402

ADDS, DIGESTS, SEARCHES, STARTS = 2000, 20, 15, 5
FACTS = """
UNWIND range($since, $until) AS i
MERGE (a:Entity {uuid: 'a' + toString(i % 997)}) SET a.name = 'Person' + toString(i % 997), a.group_id = $group
MERGE (b:Entity {uuid: 'b' + toString(i % 983)}) SET b.name = 'Place' + toString(i % 983), b.group_id = $group
CREATE (a)-[:RELATES_TO {uuid: 'f' + toString(i), group_id: $group, name: 'MET', episodes: [], created_at: $now,
  fact: 'Person' + toString(i % 997) + ' met Place' + toString(i % 983) + ' in chapter ' + toString(i),
  fact_embedding: vecf32([x IN range(1, 1024) | rand() - 0.5])}]->(b)
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
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "bench", "version": "1"}},
}


async def median(count: int, work: Callable[[], Awaitable[Any]]) -> float:
    """Return the median seconds of doing something, after one time that does not count."""
    await work()
    took = []
    for _ in range(count):
        began = time.perf_counter()
        await work()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def greet(*argv: str) -> tuple[float, float]:
    """Start an MCP server; return the seconds until it has answered ``initialize``, and its megabytes then."""
    began = time.perf_counter()
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-I", *argv], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as child:
        assert child.stdin  # noqa: S101 -- pipes were asked for
        assert child.stdout  # noqa: S101
        child.stdin.write(json.dumps(GREETING).encode() + b"\n")
        child.stdin.flush()
        child.stdout.readline()
        took = time.perf_counter() - began
        status = Path(f"/proc/{child.pid}/status").read_text()
        child.kill()
    return took, int(status.partition("VmRSS:")[2].split()[0]) / 1000


def stock(memories: Memories, project: str) -> Any:
    """Return Graphiti as its own documentation sets it up, on the same database and models."""
    from graphiti_core import Graphiti
    from graphiti_core.driver.falkordb_driver import FalkorDriver

    model = memories.graph._model  # noqa: SLF001 -- the same clients are what makes it a comparison
    driver = FalkorDriver(falkor_db=memories.graph._db, database=project)  # noqa: SLF001
    return Graphiti(graph_driver=driver, llm_client=model.llm, embedder=model.embedder, cross_encoder=model.reranker)


async def main() -> dict[str, float]:
    """Measure everything, one after the other."""
    found: dict[str, float] = {}
    for name, argv in (("ours", (str(SCRIPTS / "memory"), "serve")), ("naive", ("-c", NAIVE))):
        greetings = [greet(*argv) for _ in range(STARTS)]
        found[f"initialize {name}"] = statistics.median(took for took, _ in greetings)
        found[f"megabytes {name}"] = statistics.median(size for _, size in greetings)

    memories = Memories(settings.read())
    began = time.perf_counter()
    for number in range(ADDS):
        await memories.add(memories.make(f"Person{number} met Place{number}."))
    found["adds per second"] = ADDS / (time.perf_counter() - began)
    await memories.queue.forget_project(memories.project)

    graph = memories.graph
    await graph.project("ours")
    theirs = stock(memories, "theirs")
    await theirs.build_indices_and_constraints()
    numbers = iter(range(1_000_000))

    async def ours_digest() -> None:
        await graph.digest("ours", memories.make(f"Person{next(numbers)} met Place{next(numbers)}."))

    async def their_digest() -> None:
        text, now = f"Person{next(numbers)} met Place{next(numbers)}.", datetime.now(UTC)
        await theirs.add_episode(str(uuid.uuid4()), text, "", now, group_id="theirs")

    found["digest ours"] = await median(DIGESTS, ours_digest)
    found["digest theirs"] = await median(DIGESTS, their_digest)

    for count in map(int, sys.argv[2:]):
        project = f"facts{count}"
        await graph.project(project)
        for since in range(0, count, 2000):
            bounds = {"since": since, "until": min(count, since + 2000) - 1, "now": datetime.now(UTC).isoformat()}
            await graph.ask(project, FACTS, group=project, **bounds)
        plain = stock(memories, project)
        query = "who met Place7 in chapter 7"

        async def ours_search(project: str = project, query: str = query) -> None:
            await graph.search(project, query, 10, entities=False)

        async def their_search(project: str = project, query: str = query, plain: Any = plain) -> None:
            await plain.search(query, group_ids=[project])

        found[f"search {count} ours"] = await median(SEARCHES, ours_search)
        found[f"search {count} theirs"] = await median(SEARCHES, their_search)
    await memories.close()
    return found


if __name__ == "__main__":
    print(json.dumps({name: round(value, 5) for name, value in asyncio.run(main()).items()}))
