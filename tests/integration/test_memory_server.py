"""The memory as OpenCode meets it: an MCP server on standard input and output, with a worker
beside.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from lib.common.datadog import Datadog

from tests.fake_openai import FakeOpenAI
from tests.memories import Rig, Session, kept
from tests.servers import collector, free_port, http_server, silent_server, until

pytestmark = pytest.mark.server
TOOLS = {"add", "search_facts", "search_entities", "episodes", "forget"}


def test_a_session_adds_and_a_later_one_finds(rig: Rig) -> None:
    first = Session(rig)
    assert "kept between sessions" in first.greeting["instructions"]
    tools = {tool["name"]: tool for tool in first.ask("tools/list")["tools"]}
    assert set(tools) == TOOLS
    assert [name for name, tool in tools.items() if "Use it when" not in tool["description"]] == [
        "search_facts"
    ]
    assert "Use it at the start of a task" in tools["search_facts"]["description"]
    added = first.works("add", text="Alice works at Acme in Paris.", about="the user said")
    assert added["state"] == "queued"
    until(lambda: rig.waiting() == 0, "the worker beside ingests it")
    first.close()

    second = Session(rig)
    (fact,) = second.works("search_facts", query="where does Alice work")["facts"]
    assert fact["fact"] == "Alice works at Acme in Paris."
    assert second.works("search_entities", query="Acme", limit=1)["entities"][0]["name"] in (
        "Acme",
        "Alice",
        "Paris",
    )
    assert second.works("episodes")["episodes"][0]["id"] == added["id"]
    assert second.works("forget", id=added["id"])["forgot"] == "memory"
    assert second.works("search_facts", query="where does Alice work")["facts"] == []
    for arguments in ({"id": added["id"]}, {"id": "Alice"}):
        done, text = second.call("forget", **arguments)
        assert (done, arguments["id"] in text) == (False, True)
    done, text = second.call("add", text=" ")
    assert (done, "empty" in text) == (False, True)
    assert second.close()[0] == 0


def test_a_memory_that_was_deleted_from_outside_begins_anew(rig: Rig) -> None:
    session = Session(rig)
    for text in ("Pia met Quo.", "Ria met Sam."):
        session.works("add", text=text)
        until(lambda: rig.waiting() == 0, "it is ingested")
        assert session.works("search_facts", query=text)["facts"][0]["fact"] == text
        rig.json("forget", "--everything")
        assert session.works("search_facts", query=text)["facts"] == []
    session.close()
    query = "CALL db.indexes() YIELD label RETURN count(label)"
    indices = rig.redis("FALKORDB", "GRAPH.RO_QUERY", rig.env["MEMORY_PROJECT"], query)
    assert indices[1][0][0] > 3, "they are made anew, too"
    assert rig.json("dead")["dead"] == []


def test_with_nothing_there_every_tool_says_what_is_missing(python: str, tmp_path: Path) -> None:
    alone = Rig.of(python, tmp_path, None, graph=free_port(), queue=free_port(), project="alone")
    session = Session(alone)
    for tool, arguments in {
        "add": {"text": "x"},
        "search_facts": {"query": "x"},
        "search_entities": {"query": "x"},
        "episodes": {},
        "forget": {"id": "00000000-0000-0000-0000-000000000000"},
    }.items():
        done, text = session.call(tool, **arguments)
        assert not done
        assert "FALKORDB_HOST" in text or "OPENAI_API_KEY" in text, text
        assert "Traceback" not in text
    assert session.close()[0] == 0


def test_databases_that_come_later_are_found(rig: Rig, fake: FakeOpenAI, tmp_path: Path) -> None:
    graph, queue = free_port(), free_port()
    late = Rig.of(rig.python, tmp_path, fake, graph=graph, queue=queue, project="late")
    session = Session(late)
    assert not session.call("add", text="Too early.")[0]
    with kept(tmp_path / "graph", graph=True, port=graph), kept(tmp_path / "queue", port=queue):
        assert session.works("add", text="Bob met Carol.")["state"] == "queued"
        until(lambda: late.waiting() == 0, "the worker finds them too")
        assert session.works("search_facts", query="bob")["facts"]
        session.close()


def test_a_server_is_ended_by_a_signal_and_gives_its_lease_back(rig: Rig, fake: FakeOpenAI) -> None:
    fake.fail(200, after=60, times=0)
    session = Session(rig, MEMORY_LEASE="60")
    session.works("add", text="Dan met Eve.")
    until(lambda: rig.redis("VALKEY", "GET", rig.key("lease")), "the worker took it")
    session.child.send_signal(signal.SIGTERM)
    assert session.child.wait(20) == 0
    assert rig.redis("VALKEY", "GET", rig.key("lease")) is None
    assert rig.waiting() == 1


def test_without_workers_or_a_model_nothing_is_ingested(rig: Rig) -> None:
    for env in ({"MEMORY_WORKERS": "0"}, {"OPENAI_API_KEY": "", "OPENAI_BASE_URL": ""}):
        session = Session(rig, **env)
        said = session.works("add", text="Fay met Gil.")
        assert (said["state"], "OPENAI_API_KEY" in said.get("note", "")) == (
            "queued",
            "OPENAI_API_KEY" in env,
        )
        session.close()
    assert rig.waiting() == 2
    assert rig.redis("VALKEY", "GET", rig.key("lease")) is None


def test_the_queue_is_reported_to_datadog(rig: Rig) -> None:
    rig.redis("VALKEY", "DEL", "memory:reported")
    rig.json("add", "Hal met Ivy.")
    with collector() as (port, taken):
        session = Session(
            rig, MEMORY_WORKERS="0", DD_API_KEY="k" * 32, DD_URL=f"http://127.0.0.1:{port}"
        )
        until(lambda: taken, "the metrics arrive")
        session.close()
    path, headers, body = taken[0]
    assert path == "/api/v2/series"
    assert headers["DD-API-KEY"] == "k" * 32
    import zlib

    series: list[dict[str, Any]] = json.loads(
        zlib.decompress(body) if headers.get("Content-Encoding") else body
    )["series"]
    ours = {
        each["metric"]: each
        for each in series
        if f"project:{rig.env['MEMORY_PROJECT']}" in each["tags"]
    }
    assert {
        name: each["points"][0]["value"] for name, each in ours.items() if "age" not in name
    } == {
        "opencode.memory.queue.depth": 1.0,
        "opencode.memory.queue.dead": 0.0,
    }
    assert 0 < ours["opencode.memory.queue.age"]["points"][0]["value"] < 600


def test_metrics_that_nobody_takes_stop_nothing(rig: Rig) -> None:
    rig.redis("VALKEY", "DEL", "memory:reported")
    rig.json("add", "Jon met Kay.")
    with collector(status=403) as (port, taken):
        session = Session(rig, DD_API_KEY="k" * 32, DD_URL=f"http://127.0.0.1:{port}")
        until(lambda: taken and rig.waiting() == 0, "the queue is emptied all the same")
        assert (
            "Datadog did not accept the metrics of the queue: HTTP status 403" in session.close()[1]
        )


def test_where_an_agent_answers_the_work_is_traced(rig: Rig) -> None:
    rig.json("add", "Lea met Max.")
    with collector() as (port, taken):
        env = {"DD_TRACE_AGENT_URL": f"http://127.0.0.1:{port}"}
        assert rig.run("work", "--once", **env).code == 0
        rig.json("search", "wherewithal", **env)
    spans = b"".join(body for path, _, body in taken if path.endswith("/traces"))
    assert b"memory.ingest" in spans
    assert b"opencode-memory" in spans
    assert b"openai" in spans
    assert b"Lea met" not in spans, "what is remembered is nobody else's"
    assert b"memory.search" in spans
    assert b"GRAPH.QUERY" in spans
    assert b"wherewithal" not in spans


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # httpcore leaks it
def test_an_agent_is_asked_before_anything_is_traced(tmp_path: Path) -> None:
    def answers(**env: str) -> bool:
        return Datadog.read(env, "DD_").agent_answers()

    assert not answers()
    with collector() as (port, _), silent_server() as silent:
        agent = f"http://127.0.0.1:{port}"
        for url, expected in {
            agent: True,
            f"http://127.0.0.1:{silent}": False,
            f"http://127.0.0.1:{free_port()}": False,
            f"unix://{tmp_path}/nobody": False,
            "http://[": False,
        }.items():
            assert answers(DD_TRACE_AGENT_URL=url) == expected, url
        assert not answers(DD_TRACE_AGENT_URL=agent, DD_TRACE_ENABLED="false")
        assert answers(DD_AGENT_HOST="127.0.0.1", DD_TRACE_AGENT_PORT=str(port))
    with http_server(lambda _path, _headers: (200, b"{}"), unix=str(tmp_path / "agent")):
        assert answers(DD_TRACE_AGENT_URL=f"unix://{tmp_path}/agent")


def test_without_an_agent_nothing_is_traced(rig: Rig) -> None:
    rig.json("add", "Nat met Olu.")
    done = rig.run(
        "work", "--once", DD_AGENT_HOST="127.0.0.1", DD_TRACE_AGENT_PORT=str(free_port())
    )
    assert (done.code, done.stderr) == (0, "")
    assert (rig.waiting(), rig.count("Episodic")) == (0, 1)
