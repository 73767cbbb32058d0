"""For tests of the memory: an interpreter like the image's, databases, a fake model, and commands
that use them.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_openai import FakeOpenAI, fake_openai
from tests.memories import Kept, Rig, interpreter, kept


@pytest.fixture(scope="session")
def python() -> str:
    return interpreter()


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Kept, Kept]]:
    """FalkorDB and a queue that all tests share, each with a project of its own."""
    home = tmp_path_factory.mktemp("databases")
    with kept(home / "graph", graph=True) as graph, kept(home / "queue") as queue:
        yield graph, queue


@pytest.fixture
def fake() -> Iterator[FakeOpenAI]:
    with fake_openai() as endpoint:
        yield endpoint
        assert endpoint.wrong == []


@pytest.fixture
def rig(
    python: str, databases: tuple[Kept, Kept], fake: FakeOpenAI, tmp_path: Path
) -> Iterator[Rig]:
    graph, queue = databases
    made = Rig.of(
        python,
        tmp_path,
        fake,
        graph=graph.port,
        queue=queue.port,
        project=f"p{uuid.uuid4().hex[:8]}",
    )
    yield made
    made.end()
    made.redis(
        "VALKEY", "FLUSHALL"
    )  # a worker of the next test would digest what this one has left
