"""Names that are stop words crash FalkorDB where a full-text index has stop words of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fake_openai import FakeOpenAI
from tests.memories import Rig, kept
from tests.servers import redis_server, until

pytestmark = pytest.mark.server

RANGE = "CREATE INDEX FOR (n:Entity) ON (n.uuid, n.group_id, n.name, n.created_at)"
FULL_TEXT = (
    "CREATE FULLTEXT INDEX FOR (n:Entity) ON (n.name, n.summary, n.group_id)"
    " OPTIONS {stopwords: ['will', 'no', 'it', 'and']}"
)
FIELDS = ("uuid", "group_id", "name", "created_at")


def test_a_crash_of_falkordb_is_a_dead_letter_and_the_index_is_mended(
    python: str, fake: FakeOpenAI, tmp_path: Path
) -> None:
    with kept(tmp_path / "graph", graph=True) as graph, redis_server() as queue:
        # The project's name is a stop word too.
        rig = Rig.of(python, tmp_path, fake, graph=graph.port, queue=queue, project="and")
        rig.start("work")
        rig.json("add", "Will leads Support.")
        until(lambda: rig.count("Entity") == 2, "Will is no danger to a graph of ours")
        # The indices as Graphiti makes them.
        graph.ask("GRAPH.QUERY", "and", "CALL db.idx.fulltext.drop('Entity')")
        for field in FIELDS:
            graph.ask("GRAPH.QUERY", "and", f"DROP INDEX FOR (n:Entity) ON (n.{field})")
        for query in (RANGE, FULL_TEXT):
            assert graph.ask("GRAPH.QUERY", "and", query), query
        rig.json("add", "No owns Redis.")
        for _ in range(2):
            child = graph.child
            assert child
            until(lambda: child.poll() is not None, "FalkorDB crashes")  # noqa: B023
            graph.start()
        until(lambda: rig.json("dead")["dead"], "the memory is a dead letter")
        (dead,) = rig.json("dead")["dead"]
        assert "may have crashed" in dead["reason"]
        rig.end()
        rig.json("retry")
        rig.run("work", "--once")
        assert rig.json("status")["graph"] == {"memories": 2, "entities": 4, "facts": 2}
        indexes = "CALL db.indexes() YIELD stopwords WHERE size(stopwords) > 0 RETURN count(1)"
        assert graph.ask("GRAPH.QUERY", "and", indexes)[1] == [[0]]
        assert rig.json("search", "who leads support _ `x` _ *")["facts"]
