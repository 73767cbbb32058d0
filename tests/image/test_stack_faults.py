"""Each part of the stack killed while a conversation runs, a full volume, a damaged file: nothing
is lost.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

from pipeline.core.settings import ROOT
from tests.conftest import SUBNET
from tests.fake_openai import EMBEDDER, KEY, MODEL, Call, FakeOpenAI, fake_openai, text_of
from tests.image.conftest import derive
from tests.servers import until
from tests.stack_up import Up

pytestmark = pytest.mark.engine

HOST = SUBNET.partition("/")[0]
"""An address of this machine that containers of every network reach: of the bridge that the tests'
docker has.
"""

AGENT = """\
import http.server, threading, peer
for port in (8126, 4318):
    threading.Thread(target=http.server.ThreadingHTTPServer(("0.0.0.0", port), peer.Handler).serve_forever).start()
"""


@dataclass
class Mind:
    """A model that adds to the memory what it is told, and thinks, when it is to, until it may go
    on.
    """

    thinking: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)

    def __call__(self, messages: list[dict[str, Any]], tools: list[str]) -> str | Call:
        last = messages[-1]
        if last["role"] == "tool":
            return f"The memory says: {text_of(last)}"
        said = text_of(last)
        if "Remember: " not in said or "memory_add" not in tools:
            return "A title"
        self.thinking.set()
        assert self.go.wait(60)
        fact = said.partition("Remember: ")[2].strip().strip('"')
        return Call("memory_add", {"text": fact, "about": "the user said"})


@dataclass
class Session:
    """A session with the stack's server, whose model is a ``Mind``."""

    stack: Up
    mind: Mind
    session: str = ""

    def remember(self, fact: str, meanwhile: Callable[[], None]) -> Future[Any]:
        """Say something to remember, and do something while the model thinks; what comes is the
        answer's parts.
        """
        self.session = self.session or self.stack.ask("/session", "POST", {})["id"]
        model, text = {"providerID": "fake", "modelID": MODEL}, f"Remember: {fact}"
        body = {"model": model, "parts": [{"type": "text", "text": text}]}
        self.mind.thinking.clear()
        self.mind.go.clear()
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(
                self.stack.ask, f"/session/{self.session}/message", "POST", body, 120
            )
            assert self.mind.thinking.wait(60)
            meanwhile()
            self.mind.go.set()
        return answer

    def messages(self) -> list[dict[str, Any]]:
        return list(self.stack.ask(f"/session/{self.session}/message"))


def write(stack: Up, name: str, **variables: str) -> None:
    stack.home.mkdir(exist_ok=True, mode=0o700)
    path = stack.home / name
    path.touch(0o600)
    path.write_text("".join(f"{key}={value}\n" for key, value in variables.items()))


def converse(stack: Up, fake: FakeOpenAI) -> None:
    """Start the stack, with an Agent, and have its server know the model."""
    write(
        stack,
        "server.env",
        OPENAI_BASE_URL=fake.url,
        OPENAI_API_KEY=KEY,
        MEMORY_MODEL=MODEL,
        MEMORY_EMBEDDING_MODEL=EMBEDDER,
    )
    write(stack, "datadog.env", DD_API_KEY="k")
    stack.ok("up")
    options = {"baseURL": fake.url, "apiKey": KEY}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": options,
        "models": {MODEL: {"tool_call": True}},
    }
    config = json.dumps({"provider": {"fake": provider}, "model": f"fake/{MODEL}"})
    stack.inside("opencode", "sh", "-c", 'printf %s "$1" > /workspace/opencode.json', "-", config)
    stack.ask("/instance/dispose", "POST")  # it has read the project's configuration already


def test_whatever_is_killed_in_a_conversation_comes_back_and_nothing_is_lost(
    stack: Up, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = derive(
        stack.built,
        "agent",
        "COPY peer.py agent.py /agent/",
        'ENTRYPOINT ["tini", "--", "/opt/venv/bin/python", "/agent/agent.py"]',
        files={
            "peer.py": (ROOT / "pipeline/smoke/fake_upstreams.py").read_text(),
            "agent.py": AGENT,
        },
    )
    monkeypatch.setenv("INVOKE_STACK_AGENT", agent)
    mind = Mind()
    with fake_openai(mind, host=HOST) as fake:
        converse(stack, fake)
        assert (
            json.loads(stack.inv("status", "--json").stdout)["answers"]["datadog"]["state"] == "ok"
        )
        talk = Session(stack, mind)
        facts = []
        for part, name in (
            ("falkordb", "Alice"),
            ("valkey", "Bob"),
            ("backup", "Carol"),
            ("datadog", "Dora"),
        ):
            facts.append(f"{name} works at Acme")
            answer = talk.remember(facts[-1], lambda part=part: stack.crash(part)).result()  # type: ignore[misc]
            (said,) = [each["text"] for each in answer["parts"] if each["type"] == "text"]
            assert "The memory says" in said
            until(lambda part=part: stack.restarted(part), f"{part} is started again")  # type: ignore[misc]

        facts.append("Erin works at Acme")
        cut = talk.remember(facts[-1], lambda: stack.crash("opencode"))
        assert isinstance(cut.exception(), requests.RequestException)
        until(lambda: stack.restarted("opencode"), "the server is started again")
        stack.ok("up")  # and answers
        assert facts[-1] in json.dumps(talk.messages()), (
            "the question is there, only its answer is not"
        )
        talk.remember(facts[-1], lambda: None).result()

        def memory(*words: str) -> dict[str, Any]:
            return dict(
                json.loads(stack.inside("opencode", "/app/scripts/memory", *words, "--json"))
            )

        until(lambda: memory("status")["graph"]["facts"] >= len(facts), "all is digested")
        assert (
            sorted(each["text"] for each in memory("episodes", "--limit", "50")["episodes"])
            == facts
        )
        stack.inv("status").failed(
            "StackUnwell", 74, "valkey has restarted 1 times", "opencode has restarted 1 times"
        )
        url = "http://127.0.0.1:8126/received?0"
        spans = json.loads(stack.inside("datadog", "curl", "-fsS", url))
        assert "opencode" in spans["server"]
        assert fake.wrong == []


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path) -> Path:
    """Write a file until no byte more has room."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return filler


@pytest.mark.parametrize(
    "stack", ["podman"], indirect=True
)  # the sentences are the databases', whatever the engine
def test_a_full_volume_and_a_damaged_file_are_said_and_mended_without_a_loss(
    stack: Up, small: Path
) -> None:
    volume, filler = stack.volume("valkey"), fill(small)
    stack.engine(
        "volume",
        "create",
        "--opt",
        "type=none",
        "--opt",
        "o=bind",
        "--opt",
        f"device={small}",
        volume,
    )
    stack.inv("up").failed("PartDown", 73, "valkey", "its volume is full")
    filler.unlink()
    stack.ok("up")

    assert stack.valkey("SET", "first", "1") == "OK"
    filler = fill(small)
    until(lambda: "MISCONF" in stack.valkey("SET", "second", "2"), "a write is refused")
    assert stack.valkey("GET", "first") == "1"
    stack.inv("status").failed(
        "StackUnwell", 74, "the disk of valkey's /var/lib/opencode is 100% full"
    )
    assert stack.ask("/session", "POST", {"title": "as ever"})["title"] == "as ever"
    filler.unlink()
    until(lambda: stack.valkey("SET", "second", "2") == "OK", "there is room again")
    assert stack.valkey("GET", "first") == "1"

    files, image = "/var/lib/opencode/appendonlydir", stack.inspect("valkey")["Image"]
    stack.inside(
        "valkey", "sh", "-c", f"echo rubbish that is no command >> $(ls {files}/*.incr.aof)"
    )
    stack.crash("valkey")
    stack.inv("up").failed("PartDown", 73, "valkey", "its file on disk is damaged")
    stack.inv("status").failed("StackUnwell", 74, "valkey")
    stack.ok("down")
    mend = "echo y | valkey-check-aof --fix /v/appendonlydir/appendonly.aof.manifest"
    repair = [
        "run",
        "--rm",
        *stack.built.engine.limits,
        "--volume",
        f"{volume}:/v",
        image,
        "sh",
        "-c",
        mend,
    ]
    assert "Successfully truncated" in stack.engine(*repair)
    stack.ok("up")
    assert stack.valkey("GET", "second") == "2"
