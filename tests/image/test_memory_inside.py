"""The memory through the whole image: a conversation adds to it, and a later session of another
server finds it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.engines.container import Container, Server, running, wait_ready
from tests.conftest import DOCKER, PODMAN, Built
from tests.fake_openai import EMBEDDER, KEY, MODEL, Call, FakeOpenAI, fake_openai, text_of
from tests.image.conftest import derive
from tests.memories import kept
from tests.servers import free_port, until

pytestmark = pytest.mark.engine

FACT = "Alice works at Acme in Paris."


def mind(messages: list[dict[str, Any]], tools: list[str]) -> str | Call:
    """Call a tool of the memory when the user asks for it, and tell what it said."""
    last = messages[-1]
    if last["role"] == "tool":
        return f"The memory says: {text_of(last)}"
    if "Remember" in text_of(last) and "memory_add" in tools:
        return Call("memory_add", {"text": FACT, "about": "the user said"})
    if "Where" in text_of(last) and "memory_search_facts" in tools:
        return Call("memory_search_facts", {"query": "where does Alice work"})
    return "A title"


def say(server: Server, text: str) -> list[dict[str, Any]]:
    """Say something in a new session and return the parts of the answer."""
    import requests

    with requests.Session() as session:
        session.trust_env = False
        made = session.post(f"{server.url}/session", json={}, timeout=30).json()["id"]
        model = {"providerID": "fake", "modelID": MODEL}
        body = {"model": model, "parts": [{"type": "text", "text": text}]}
        session.post(
            f"{server.url}/session/{made}/message", json=body, timeout=90
        ).raise_for_status()
        answers = session.get(f"{server.url}/session/{made}/message", timeout=30).json()
    return [
        part
        for answer in answers
        if answer["info"]["role"] == "assistant"
        for part in answer["parts"]
    ]


@contextmanager
def served(
    built: Built, name: str, fake: FakeOpenAI, ports: dict[str, int]
) -> Iterator[tuple[Container, Server]]:
    """Run the image on the host's network, where its databases and its model are, on a port of its
    own.
    """
    port = free_port()
    env = {
        "FALKORDB_HOST": "127.0.0.1",
        "VALKEY_HOST": "127.0.0.1",
        **{key: str(value) for key, value in ports.items()},
    }
    env |= {
        "OPENAI_BASE_URL": fake.url,
        "OPENAI_API_KEY": KEY,
        "MEMORY_MODEL": MODEL,
        "MEMORY_EMBEDDING_MODEL": EMBEDDER,
    }
    provider = {"npm": "@ai-sdk/openai-compatible", "options": {"baseURL": fake.url, "apiKey": KEY}}
    config = {
        "provider": {"fake": {**provider, "models": {MODEL: {"tool_call": True}}}},
        "model": f"fake/{MODEL}",
    }
    command = [
        "tini",
        "--",
        "ddtrace-run",
        "opencode",
        "serve",
        "--hostname",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    image = derive(
        built,
        name,
        "COPY opencode.json /workspace/",
        *(f"ENV {key}={value}" for key, value in env.items()),
        f"ENTRYPOINT {json.dumps(command)}",
        files={"opencode.json": json.dumps(config)},
    )
    with running(built.engine, image, network="host") as container:
        server = Server(f"http://127.0.0.1:{port}", timeout=10)
        wait_ready(server, time.monotonic() + 60, log=container.logs)
        yield container, server


@PODMAN
@pytest.mark.usefixtures("unmoved")
def test_a_second_session_finds_what_the_first_was_told(built: Built, tmp_path: Path) -> None:
    name = f"memory-{built.engine.name}"
    with (
        fake_openai(mind) as fake,
        kept(tmp_path / "graph", graph=True) as graph,
        kept(tmp_path / "queue") as queue,
    ):
        ports = {"FALKORDB_PORT": graph.port, "VALKEY_PORT": queue.port}
        with served(built, name, fake, ports) as (container, server):
            mcp = until(lambda: server.get("/mcp", timeout=40).json(), "the list of MCP servers")
            assert mcp["memory"]["status"] == "connected", mcp
            parts = say(server, "Remember where Alice works.")
            (call,) = [part for part in parts if part["type"] == "tool"]
            assert (call["tool"], call["state"]["status"]) == ("memory_add", "completed"), call
            assert json.loads(call["state"]["output"])["state"] == "queued"

            def ingested() -> bool:
                done = container.exec("/app/scripts/memory", "status", "--json")
                return bool(json.loads(done.stdout)["graph"]["facts"])

            until(ingested, "the worker beside the MCP server ingests it")
        with served(built, name, fake, ports) as (_, server):
            parts = say(server, "Where does Alice work?")
            (call,) = [part for part in parts if part["type"] == "tool"]
            assert call["tool"] == "memory_search_facts"
            assert any(FACT in part["text"] for part in parts if part["type"] == "text"), parts
        assert fake.wrong == []


@DOCKER
@pytest.mark.usefixtures("unmoved")
def test_with_nothing_to_remember_with_the_server_is_as_it_was(built: Built) -> None:
    with running(built.engine, built.inspect()["Id"], network="none") as container:
        container.wait_ready_inside(60)
        asked = container.exec("curl", "-fsS", "-m", "40", "http://localhost:4096/mcp", timeout=60)
        assert json.loads(asked.stdout)["memory"]["status"] == "connected", asked.output
        said = container.exec("/app/scripts/memory", "add", "Alice works at Acme.")
        assert said.code == 69
        assert all(
            name in said.stderr
            for name in ("VALKEY_HOST", "OPENAI_API_KEY", "the memory was not stored")
        )
