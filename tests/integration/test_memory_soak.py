"""Several processes add, workers and databases are killed again and again: what went in is in, all of it, once.

MEMORY_SOAK=5000 makes it a long one.
"""

from __future__ import annotations

import collections
import json
import os
import random
import subprocess
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.fake_openai import FakeOpenAI
from tests.memories import Kept, Rig, kept
from tests.servers import until

pytestmark = [pytest.mark.server, pytest.mark.timeout(7200)]
COUNT = int(os.environ.get("MEMORY_SOAK", "60"))
PROJECTS, ADDERS, WORKERS, BATCH = ("red", "green"), 3, 2, 20
CALM_SECONDS = 1.5
"""Between two kills: a worker needs a second to start, and would otherwise never get anything done.
"""


def insist(*batches: tuple[Rig, list[dict[str, str]]]) -> None:
    """Add memories until all are taken. Without FalkorDB in reach, so that none goes around the
    queue.
    """
    for rig, rows in batches:
        given = "".join(json.dumps(row) + "\n" for row in rows)
        until(
            lambda: rig.run("import", "-", given=given, FALKORDB_PORT="1").code == 0,  # noqa: B023  # noqa: B023
            "a batch is taken",
            600,
        )


def tally(rig: Rig, query: str) -> dict[Any, int]:
    """Count a query's rows by their first column."""
    rows = rig.redis("FALKORDB", "GRAPH.RO_QUERY", rig.env["MEMORY_PROJECT"], query)[1]
    return dict(collections.Counter(row[0] for row in rows))


def survives(databases: list[Kept], rigs: list[Rig]) -> bool:
    """Say whether something still waits; ask nobody who is being started again."""
    return any(rig.redis("VALKEY", "XLEN", rig.key("queue")) != 0 for rig in rigs) or not databases


def test_nothing_is_lost_and_nothing_is_twice(
    python: str, fake: FakeOpenAI, tmp_path: Path
) -> None:
    dice = random.Random(7)  # noqa: S311 -- a soak that can be run again
    with kept(tmp_path / "graph", graph=True) as graph, kept(tmp_path / "queue") as queue:
        rigs = [
            Rig.of(python, tmp_path, fake, graph=graph.port, queue=queue.port, project=name)
            for name in PROJECTS
        ]
        rows = [
            {
                "id": str(uuid.uuid4()),
                "text": f"Person{number} met Place{number % 9} in chapter {number}.",
            }
            for number in range(COUNT)
        ]
        batches = [
            (rigs[at // BATCH % len(rigs)], rows[at : at + BATCH]) for at in range(0, COUNT, BATCH)
        ]
        adders = [
            threading.Thread(target=insist, args=batches[first::ADDERS]) for first in range(ADDERS)
        ]
        for thread in adders:
            thread.start()
        workers = [rigs[0].start("work", pipe=subprocess.DEVNULL) for _ in range(WORKERS)]
        kills: collections.Counter[str] = collections.Counter()
        deadline = time.monotonic() + 120 + 4 * COUNT
        try:
            while any(thread.is_alive() for thread in adders) or survives([graph, queue], rigs):
                assert time.monotonic() < deadline, [rig.waiting() for rig in rigs]
                victim = dice.choice(["worker", "worker", "worker", "graph", "queue"])
                kills[victim] += 1
                if victim == "worker":
                    place = dice.randrange(WORKERS)
                    workers[place].kill()
                    workers[place].wait()
                    workers[place] = rigs[0].start("work", pipe=subprocess.DEVNULL)
                else:
                    database = graph if victim == "graph" else queue
                    database.kill()
                    database.start()
                calm = time.monotonic() + CALM_SECONDS
                until(
                    lambda: time.monotonic() > calm or not survives([graph], rigs),  # noqa: B023
                    "a calm",
                    CALM_SECONDS + 30,
                )
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
            for thread in adders:
                thread.join()
        print(f"{COUNT} memories, killed: {dict(kills)}")
        for rig, name in zip(rigs, PROJECTS, strict=True):
            mine = [row for owner, batch in batches if owner is rig for row in batch]
            state = rig.json("status")
            assert (state["queue"]["waiting"], state["queue"]["dead"]) == (0, 0), name
            exported = [json.loads(line) for line in rig.run("export").stdout.splitlines()]
            assert sorted(row["id"] for row in exported) == sorted(row["id"] for row in mine)
            assert tally(rig, "MATCH (e:Episodic) RETURN coalesce(e.pending, false)") == {
                "false": len(mine)
            }
            assert tally(rig, "MATCH (e:Episodic) RETURN e.uuid") == {row["id"]: 1 for row in mine}
            facts = tally(rig, "MATCH (:Entity)-[r:RELATES_TO]->(:Entity) RETURN r.fact")
            assert facts == {row["text"]: 1 for row in mine}
            entities = tally(rig, "MATCH (n:Entity) RETURN n.name")
            wanted = {
                word.strip(".") for row in mine for word in row["text"].split() if word[0].isupper()
            }
            assert entities == dict.fromkeys(wanted, 1)
            rig.end()
