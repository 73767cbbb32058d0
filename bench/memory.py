"""Compare the memory with graphiti-core called directly, with a fake model that answers at once.

``memory_inside.py`` measures, in an interpreter made from locks/image.txt; databases are real.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from bench.ratio import Ratio
from pipeline.core import process
from pipeline.core.dev_tools import ensure_dev_tools
from pipeline.core.errors import ChecksFailed
from pipeline.core.settings import ROOT

COUNTS = (10, 1_000, 100_000)
"""Facts in the graph that is searched."""


def bench() -> list[Ratio]:
    """Measure start, memory use, adding, ingesting and searching; it takes some minutes."""
    found = measure()
    naive = "an MCP server that imports Graphiti first"
    directly = "Graphiti's add_episode"
    ratios = [
        Ratio("MCP server: start to initialize", naive, "ms", *found["initialize"], 0.6),
        Ratio("MCP server: idle", naive, "MB", *found["megabytes"], 0.6),
        Ratio("adding a memory to the queue", directly, "ms", *found["add"], 0.05),
        Ratio("ingesting a memory", directly, "ms", *found["ingest"], 1.1),
    ]
    for count in COUNTS:
        what = f"search among {count:,} facts"
        ratios.append(Ratio(what, "Graphiti's search", "ms", *found[f"search {count}"], 1.1))
    return ratios


def measure() -> dict[str, tuple[float, float]]:
    """Return what ``memory_inside.py`` measured: ours and theirs of each, in ms or MB."""
    ensure_dev_tools()
    from tests.fake_openai import EMBEDDER, KEY, MODEL, fake_openai
    from tests.memories import interpreter
    from tests.servers import redis_server

    env = {
        "PATH": os.environ["PATH"],
        "FALKORDB_HOST": "127.0.0.1",
        "VALKEY_HOST": "127.0.0.1",
        "MEMORY_PROJECT": "bench",
        "OPENAI_API_KEY": KEY,
        "MEMORY_MODEL": MODEL,
        "MEMORY_EMBEDDING_MODEL": EMBEDDER,
        "GRAPHITI_TELEMETRY_ENABLED": "false",
    }
    script = str(Path(__file__).with_name("memory_inside.py"))
    argv = [
        interpreter(),
        "-I",
        script,
        str(ROOT / "scripts"),
        *map(str, COUNTS),
    ]
    with (
        tempfile.TemporaryDirectory() as home,
        fake_openai() as model,
        redis_server(graph=True) as graph,
        redis_server("--appendonly", "yes") as queue,
    ):
        env |= {"HOME": home, "OPENAI_BASE_URL": model.url}
        env |= {"FALKORDB_PORT": str(graph), "VALKEY_PORT": str(queue)}
        result = process.run(argv, env=env, cwd=home)
    if not result.ok:
        raise ChecksFailed(
            "the memory benchmark failed",
            "See its output above.",
            result.output,
        )
    found: dict[str, tuple[float, float]] = json.loads(result.stdout.splitlines()[-1])
    return found
