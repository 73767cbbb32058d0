"""The database user that the server has: enough for the memory, and nothing else."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from pipeline.core.settings import ROOT
from tests.fake_openai import FakeOpenAI
from tests.memories import Rig
from tests.servers import redis_server

pytestmark = pytest.mark.server

ADMIN, PASSWORD = "of-the-administrator", "of-the-memory"


def user(part: str) -> list[str]:
    """Return what compose.yaml says about the user, as options of redis-server."""
    services = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    (script,) = services[f"opencode-{part}"]["command"]
    (line,) = re.findall(r"^user .*", script, re.MULTILINE)
    words = shlex.split(line.replace(f"$${part.upper()}_MEMORY_PASSWORD", PASSWORD))
    return [f"--{words[0]}", *words[1:], "--appendonly", "yes"]


@pytest.fixture
def limited(python: str, fake: FakeOpenAI, tmp_path: Path) -> Iterator[Rig]:
    """Commands of the memory that sign in as the server does."""
    with (
        redis_server(*user("falkordb"), graph=True, password=ADMIN) as graph,
        redis_server(*user("valkey"), password=ADMIN) as queue,
    ):
        name = f"p{uuid.uuid4().hex[:8]}"
        rig = Rig.of(python, tmp_path, fake, graph=graph, queue=queue, project=name)
        for part in ("FALKORDB", "VALKEY"):
            rig.env[f"{part}_USERNAME"] = "memory"
            rig.env[f"{part}_PASSWORD"] = PASSWORD
        yield rig
        rig.end()


def client(rig: Rig, part: str, username: str = "memory", password: str = PASSWORD) -> Any:
    return redis.Redis(
        port=int(rig.env[f"{part}_PORT"]), username=username, password=password, protocol=2
    )


def test_the_memory_and_status_work_with_it(limited: Rig) -> None:
    added = limited.json("add", "Alice works at Acme in Paris.")
    limited.json("add", "Bob owns Redis.")
    assert limited.run("work", "--once").code == 0
    status = limited.json("status")
    assert (status["queue"]["waiting"], status["queue"]["dead"]) == (0, 0)
    assert status["graph"]["memories"] == 2
    assert status["problems"] == []
    (fact,) = limited.json("search", "where does alice work?", "--limit", "1")["facts"]
    assert fact["memories"] == [added["id"]]
    assert limited.json("forget", added["id"])["forgot"] == "memory"
    assert limited.run("forget", "--everything", "--json").code == 0
    assert limited.json("status")["graph"]["memories"] == 0
    argv = [sys.executable, str(ROOT / "scripts/status"), "--json"]
    said = subprocess.run(argv, env=limited.env, capture_output=True, text=True, check=False)
    parts = yaml.safe_load(said.stdout)["parts"]
    assert (parts["falkordb"]["state"], parts["valkey"]["state"]) == ("ok", "ok"), parts


@pytest.mark.parametrize("part", ["FALKORDB", "VALKEY"])
def test_it_may_not_do_more(limited: Rig, part: str) -> None:
    denied = [
        "FLUSHALL",
        "FLUSHDB",
        "CONFIG GET requirepass",
        "CONFIG SET dir /tmp",
        "KEYS *",
        "SCAN 0",
        "ACL LIST",
        "ACL SETUSER memory +@all",
        "SHUTDOWN NOSAVE",
        "REPLICAOF 127.0.0.1 1",
        "PSYNC ? -1",
        "MONITOR",
        "CLIENT LIST",
        "BGREWRITEAOF",
        "GRAPH.CONFIG GET *",
        "GRAPH.DELETE other",
        "GRAPH.COPY a b",
    ]
    for command in denied:
        # Redis without the module says that it does not know the command.
        if part == "VALKEY" and command.startswith("GRAPH."):
            continue
        with pytest.raises(redis.exceptions.NoPermissionError):
            client(limited, part).execute_command(*command.split())
    with pytest.raises(redis.exceptions.AuthenticationError):
        client(limited, part, "default").ping()
    assert client(limited, part, "default", ADMIN).ping()


def test_keys_of_others_are_out_of_reach_in_valkey(limited: Rig) -> None:
    assert client(limited, "VALKEY", "default", ADMIN).set("another", 1)
    for command in ("GET another", "DEL another", "SET another 2"):
        with pytest.raises(redis.exceptions.NoPermissionError):
            client(limited, "VALKEY").execute_command(*command.split())
    script = "return redis.call('DEL', 'another')"
    with pytest.raises(redis.exceptions.ResponseError):
        client(limited, "VALKEY").eval(script, 0)
    assert client(limited, "VALKEY", "default", ADMIN).get("another") == b"1"
