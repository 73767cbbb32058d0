"""The memory against graphiti-core called directly, with the image's packages and a fake model that answers at once.

What is measured runs in ``memory_inside.py``, in an interpreter made from locks/image.txt; databases are real.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

from pipeline.report import say
from pipeline.settings import ROOT

COUNTS = (10, 1_000, 100_000)
"""Facts in the graph that is searched."""


def measure() -> dict[str, float]:
    """Return what ``memory_inside.py`` measured: seconds, megabytes, and adds per second; takes some minutes."""
    from tests.fake_openai import EMBEDDER, KEY, MODEL, fake_openai
    from tests.memories import interpreter
    from tests.servers import redis_server

    with (
        tempfile.TemporaryDirectory() as home,
        fake_openai() as fake,
        redis_server(graph=True) as graph,
        redis_server("--appendonly", "yes") as queue,
    ):
        env = {
            "PATH": os.environ["PATH"], "HOME": home, "FALKORDB_PORT": str(graph), "VALKEY_PORT": str(queue),
            "FALKORDB_HOST": "127.0.0.1", "VALKEY_HOST": "127.0.0.1", "MEMORY_PROJECT": "bench",
            "OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": fake.url,
            "MEMORY_MODEL": MODEL, "MEMORY_EMBEDDING_MODEL": EMBEDDER, "GRAPHITI_TELEMETRY_ENABLED": "false",
        }  # fmt: skip
        argv = [interpreter(), "-I", str(Path(__file__).with_name("memory_inside.py")), str(ROOT / "scripts")]
        argv += [str(count) for count in COUNTS]
        done = subprocess.run(argv, env=env, cwd=home, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    for name, value in found.items():
        say(f"bench: memory: {name}: {value:g}")
    return found
