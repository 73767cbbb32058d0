"""Waiting for a server, against real ones on loopback; containers, always removed, with an engine
that is a script.
"""

import base64
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import requests

from pipeline.core import process
from pipeline.core.errors import EngineBroken, PipelineError, PortTaken, ServerDied, ServerSilent
from pipeline.engines import container
from pipeline.engines.container import (
    PREFIX,
    SECRET,
    Container,
    Server,
    remove_leftovers,
    running,
    wait_ready,
)
from pipeline.engines.engine import Engine
from tests.servers import Reply, free_port, http_server, silent_server


def soon(seconds: float = 0.25) -> float:
    return time.monotonic() + seconds


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ((500, b"boom in the server"), "/config answered 500: boom in the server"),
        ((404, b""), "/config answered 404"),
        ((200, b"<html>"), "answered 200, but not JSON: <html>"),
        ((200, b""), "answered 200, but not JSON"),
    ],
)
def test_a_wrong_answer_is_quoted_when_time_is_up(reply: Reply, words: str) -> None:
    with http_server(lambda *_: reply) as port:
        began = time.monotonic()
        with pytest.raises(ServerSilent) as caught:
            wait_ready(Server(f"http://127.0.0.1:{port}"), soon(), log=lambda: "its log")
        assert 0.25 <= time.monotonic() - began < 3
    assert words in caught.value.what
    assert caught.value.details == "its log"


def test_a_password_it_lacks_ends_the_wait_at_once() -> None:
    with http_server(lambda *_: (401, b"")) as port:
        began = time.monotonic()
        with pytest.raises(ServerSilent, match="answered 401") as caught:
            wait_ready(Server(f"http://127.0.0.1:{port}"), soon(60))
        assert time.monotonic() - began < 5
    assert SECRET in caught.value.remedy


def test_one_that_accepts_and_never_answers() -> None:
    with (
        silent_server() as port,
        pytest.raises(ServerSilent, match="accepted a request and did not answer"),
    ):
        wait_ready(Server(f"http://127.0.0.1:{port}", timeout=0.2), soon())


def test_one_that_refuses() -> None:
    with pytest.raises(ServerSilent, match=r"no server answers at http://127\.0\.0\.1"):
        wait_ready(Server(f"http://127.0.0.1:{free_port()}"), soon())


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:port", "http://", "gopher://127.0.0.1", "http://me:hidden@x:y"]
)
def test_an_address_that_is_none_ends_the_wait_at_once(url: str) -> None:
    began = time.monotonic()
    with pytest.raises(ServerSilent, match="no server answers at ") as caught:
        wait_ready(Server(url), soon(60))
    assert time.monotonic() - began < 5
    assert "hidden" not in str(caught.value)


def test_a_certificate_that_is_refused_ends_the_wait_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise requests.exceptions.SSLError("self-signed certificate")

    monkeypatch.setattr(Server, "get", refuse)
    began = time.monotonic()
    with pytest.raises(
        ServerSilent, match=r"no server answers at https://opencode\.example\.com: SSLError"
    ):
        wait_ready(Server("https://me:hidden@opencode.example.com"), soon(60))
    assert time.monotonic() - began < 5


def test_one_whose_first_request_hangs_and_that_is_not_ready_at_first() -> None:
    over, asked = threading.Event(), []

    def respond(path: str, _headers: Mapping[str, str]) -> Reply:
        asked.append(path)
        if len(asked) == 1:
            over.wait(30)
        return (503, b"") if len(asked) < 4 else (200, b"{}")

    with http_server(respond) as port:
        try:
            wait_ready(Server(f"http://127.0.0.1:{port}", timeout=0.3), soon(20))
        finally:
            over.set()
    assert asked == ["/config"] * 4


def test_one_that_dies_while_it_is_waited_for() -> None:
    def dead() -> None:
        raise ServerDied("the container ended", "See its log.")

    began = time.monotonic()
    with pytest.raises(ServerDied):
        wait_ready(Server(f"http://127.0.0.1:{free_port()}"), soon(60), alive=dead)
    assert time.monotonic() - began < 5


def test_requests_are_signed_in_and_take_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    signed: list[str] = []

    def respond(_path: str, headers: Mapping[str, str]) -> Reply:
        signed.append(headers.get("Authorization", ""))
        return 200, b"{}"

    with http_server(respond) as port:
        server = Server(f"http://127.0.0.1:{port}", "pw")
        server.get("/config")
        server.send("POST", "/session", {"title": "x"})
        monkeypatch.setenv("OPENCODE_SERVER_USERNAME", "me")
        server.get("/config")
        Server(server.url).get("/config")
    words = [base64.b64decode(each.removeprefix("Basic ")).decode() for each in signed]
    assert words == ["opencode:pw", "opencode:pw", "me:pw", ""]
    with silent_server() as port, pytest.raises(requests.ReadTimeout):
        Server(f"http://127.0.0.1:{port}").get("/x", timeout=0.1)


def test_one_elsewhere_is_asked_through_the_users_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    asked: list[str] = []

    def respond(path: str, _headers: Mapping[str, str]) -> Reply:
        asked.append(path)
        return 200, b"{}"

    with http_server(respond) as port:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        Server("http://opencode.invalid:4096").get("/config")
        for ours in (f"localhost:{port}", f"127.0.0.1:{port}", f"me:pw@127.0.0.1:{port}"):
            Server(f"http://{ours}").get("/ours")
    assert asked == ["http://opencode.invalid:4096/config", "/ours", "/ours", "/ours"]


Fake = Callable[[str], Engine]


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """An engine that is a shell script: ``log`` keeps its command lines, each word's case is the
    test's.
    """

    def make(cases: str) -> Engine:
        program = tmp_path / "podman"
        log = tmp_path / "log"
        program.write_text(
            f'#!/bin/sh\necho "$* {SECRET}=${SECRET}" >> {log}\ncase "$1" in\n{cases}\nesac\n'
        )
        program.chmod(0o755)
        return Engine("podman", str(program), "4.3.1")

    return make


def log(engine: Engine) -> list[str]:
    return Path(engine.program).with_name("log").read_text().splitlines()


def state(*, running: bool, code: int = 0) -> str:
    return f"""inspect) echo '{json.dumps({"Running": running, "ExitCode": code})}' ;;"""


def test_a_container_is_published_on_loopback_and_removed(fake: Fake) -> None:
    engine = fake(
        f"port) echo 127.0.0.1:41234 ;; logs) echo out; echo err >&2 ;; {state(running=True)}"
    )
    with running(engine, "image", port=41234, password="pw") as started:  # noqa: S106 -- of no server
        assert started.server == Server("http://127.0.0.1:41234", "pw", 5.0)
        assert started.name.startswith(f"{PREFIX}-{os.getpid()}-")
        assert started.logs() == "out\nerr"
        assert started.exec("true").ok
        with running(engine, "image", network="none") as other:
            assert other.server == Server("")
            assert other.name != started.name
    ran, *rest = log(engine)
    assert "--publish 127.0.0.1:41234:4096" in ran
    # A process ID means this process only on this host, in this namespace.
    here = f"{socket.gethostname()} pid:[{Path('/proc/self/ns/pid').stat().st_ino}]"
    assert f"--label {PREFIX}={here} --volume" in ran
    assert "--env OPENCODE_SERVER_PASSWORD " in ran  # by name: a value would show in ps
    assert ran.endswith(f"{SECRET}=pw")
    alone = next(line for line in rest if line.startswith("run"))
    assert "--network none" in alone
    assert "--publish" not in alone
    assert ran.count("--volume /root/.local/share/opencode --volume /workspace image") == 1
    removed = [line for line in rest if line.startswith("rm --force --volumes --time 0 ")]
    assert [line.split()[5] for line in removed] == [other.name, started.name]


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, RuntimeError])
def test_a_container_is_removed_whatever_happens(fake: Fake, trouble: type[BaseException]) -> None:
    engine = fake("port) echo 0.0.0.0:5 ;;")
    with contextlib.suppress(trouble), running(engine, "image"):
        raise trouble
    assert log(engine)[-1].startswith("rm --force")


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, RuntimeError])
def test_a_removal_that_a_signal_cuts_short_is_done_again(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, trouble: type[BaseException]
) -> None:
    engine = fake("port) echo 0.0.0.0:5 ;;")
    run, cut = process.run, [trouble, None]

    def interrupted(argv: list[str], **options: Any) -> process.Completed:
        if argv[1] == "rm" and (error := cut.pop(0)):
            raise error
        return run(argv, **options)

    monkeypatch.setattr(process, "run", interrupted)
    with pytest.raises(trouble), running(engine, "image") as started:
        pass
    assert cut == []
    assert log(engine)[-1].startswith(f"rm --force --volumes --time 0 {started.name} ")


@pytest.mark.parametrize(
    ("cases", "failure", "words"),
    [
        (
            "run) echo 'listen tcp 127.0.0.1:9: bind: address already in use' >&2; exit 126 ;;",
            PortTaken,
            "port 9 on",
        ),
        (
            "run) echo 'Bind for 127.0.0.1:9 failed: port is already allocated' >&2; exit 125 ;;",
            PortTaken,
            "port 9 on",
        ),
        (
            "run) echo 'exec: \"tini\": executable file not found in $PATH' >&2; exit 127 ;;",
            ServerDied,
            "entrypoint",
        ),
        (
            "run) echo 'Failed to bind port 9 (Address already in use) for option' >&2; exit 126 ;;",
            PortTaken,
            "port 9",
        ),
        (
            "run) echo 'exec: \"pasta\": executable file not found in $PATH' >&2; exit 127 ;;",
            EngineBroken,
            "cannot start",
        ),
        (
            "run) echo 'netavark: no such file or directory' >&2; exit 127 ;;",
            EngineBroken,
            "cannot start the image",
        ),
        (
            "run) echo 'exec tini: No such file or directory' >&2; exit 127 ;;",
            ServerDied,
            "entrypoint",
        ),
        (
            "run) echo 'setrlimit: not permitted' >&2; exit 126 ;;",
            EngineBroken,
            "cannot start the image",
        ),
        (
            "port) exit 1 ;; logs) echo config is bad ;; " + state(running=False, code=3),
            ServerDied,
            "exited with 3",
        ),
        ("port) ;; " + state(running=False, code=4), ServerDied, "exited with 4"),
    ],
)
def test_a_start_that_fails_is_explained_and_leaves_nothing(
    fake: Fake, cases: str, failure: type[PipelineError], words: str
) -> None:
    engine = fake(cases)
    with pytest.raises(PipelineError) as caught, running(engine, "image", port=9):
        pass
    assert type(caught.value) is failure
    assert words in caught.value.what
    assert log(engine)[-1].startswith("rm --force")


def test_the_log_of_a_container_that_died_is_quoted(fake: Fake) -> None:
    engine = fake(f"logs) echo unknown key ;; {state(running=False, code=1)}")
    dead = Container(engine, "n", time.monotonic(), Server(f"http://127.0.0.1:{free_port()}"))
    with pytest.raises(ServerDied, match="exited with 1 before the server") as caught:
        dead.wait_ready(30)
    assert caught.value.details == "unknown key"
    dead.engine = fake("exec) exit 124 ;; logs) echo booting ;; " + state(running=True))
    with pytest.raises(
        ServerSilent, match=r"the server did not answer within 0\.2 s without a network"
    ) as silent:
        dead.wait_ready_inside(0.2)
    assert silent.value.details == "booting"
    dead.engine = fake(state(running=True))
    dead.wait_ready_inside(5)
    assert dead.ready_seconds > 0


def test_the_containers_of_killed_smoke_tests_are_removed_and_no_others(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "_alive", lambda pid: pid == 42)
    engine = fake(f"ps) echo {PREFIX}-41-abc; echo {PREFIX}-42-abc; echo {PREFIX}-43-abc ;;")
    assert remove_leftovers(engine) == 2
    assert [line.split()[5] for line in log(engine)[1:]] == [f"{PREFIX}-41-abc", f"{PREFIX}-43-abc"]
    assert remove_leftovers(engine, whose=42) == 1
    assert log(engine)[-1].split()[5] == f"{PREFIX}-42-abc"
    assert log(engine)[0].startswith(
        f"ps --all --filter label={PREFIX}={container._here()} --format "
    )


def test_who_is_alive() -> None:
    assert container._alive(os.getpid())
    assert container._alive(1)
    assert not container._alive(2**22 + 1)  # above the highest number that Linux gives
