"""scripts/status against real servers on loopback."""

import base64
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.servers import Reply, Respond, free_port, http_server, redis_server, silent_server

pytestmark = pytest.mark.server
STATUS = Path(__file__).parents[2] / "scripts" / "status"
SECRET = 'hunt"er\\ 2 $é'  # noqa: S105 -- of servers that a test makes

PROVIDERS = {
    "providers": [{"id": "own", "options": {"baseURL": "http://host:1/v1"}}],
    "default": {"own": "m"},
}
"""What /config/providers of a server with one provider returns."""


def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            STATUS,
            *words,
        ],
        env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **env},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert not [
        secret
        for secret in (SECRET, "hunt", base64.b64encode(SECRET.encode()).decode())
        if secret in done.stdout
    ]
    assert "hunt" not in done.stderr
    assert "Traceback" not in done.stderr
    return done


def ask(part: str, *words: str, **env: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code and what --json reports of one service."""
    done = run(part, "--json", *words, **env)
    result = json.loads(done.stdout)
    assert result["exit"] == done.returncode
    assert list(result["parts"]) == [part]
    return done.returncode, result["parts"][part]


def opencode(password: str = "", user: str = "opencode", **routes: Reply) -> Respond:
    """Return what an OpenCode server answers, with basic authentication when it has a password."""
    answers = {
        "health": (200, b'{"healthy": true, "version": "1.18.33"}'),
        "config": (200, b"{}"),
        "providers": (200, json.dumps(PROVIDERS).encode()),
        **routes,
    }
    wanted = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

    def respond(path: str, headers: Mapping[str, str]) -> Reply:
        if password and headers.get("Authorization") != wanted:
            return 401, b"Unauthorized"
        return answers[path.rpartition("/")[2]]

    return respond


@pytest.mark.parametrize("providers", [(500, b""), (200, b"<html>"), (200, b'{"default": 1}')])
def test_a_fault_of_providers_leaves_the_server_ok(providers: Reply) -> None:
    with http_server(opencode(providers=providers)) as port:
        code, result = ask("server", OPENCODE_SERVER_URL=url(port))
    assert (code, result["state"]) == (0, "ok")
    assert "/config/providers does not answer" in result["model"]


def url(port: int) -> str:
    return f"http://localhost:{port}"


@pytest.mark.parametrize(
    ("password", "user", "env"),
    [
        ("", "opencode", {}),
        (SECRET, "opencode", {"OPENCODE_SERVER_PASSWORD": SECRET}),
        (SECRET, "me", {"OPENCODE_SERVER_PASSWORD": SECRET, "OPENCODE_SERVER_USERNAME": "me"}),
    ],
)
def test_the_server_is_ok(password: str, user: str, env: dict[str, str]) -> None:
    with http_server(opencode(password, user)) as port:
        code, result = ask("server", OPENCODE_SERVER_URL=url(port), **env)
    assert (code, result["state"], result["version"]) == (0, "ok", "1.18.33")
    assert ("anyone who can reach the port" in result["detail"]) == (not password)
    assert result["model"] == "own/m; prompts go to host"


@pytest.mark.parametrize(
    ("respond", "env", "detail"),
    [
        (opencode(SECRET), {}, "returned status 401; check OPENCODE_SERVER_PASSWORD"),
        (
            opencode("other"),
            {"OPENCODE_SERVER_PASSWORD": SECRET},
            "returned status 401; check OPENCODE_SERVER_PASSWORD",
        ),
        (opencode(config=(500, b"{}")), {}, "/config returned status 500"),
        (opencode(config=(200, b"<html>")), {}, "unexpected response"),
        (opencode(config=(200, b"[1]")), {}, "unexpected response"),
        (opencode(health=(200, b'{"healthy": false}')), {}, "does not report healthy"),
    ],
)
def test_the_server_answers_wrongly(respond: Respond, env: dict[str, str], detail: str) -> None:
    with http_server(respond) as port:
        code, result = ask("server", OPENCODE_SERVER_URL=url(port), **env)
    assert (code, result["state"]) == (1, "failing")
    assert detail in result["detail"]


def test_no_server_is_one() -> None:
    code, result = ask("server", OPENCODE_SERVER_URL=url(free_port()))
    assert (code, result["state"]) == (1, "absent")


def test_a_request_that_hangs_once_is_made_again() -> None:
    over, asked, answer = threading.Event(), [""], opencode()

    def respond(path: str, headers: Mapping[str, str]) -> Reply:
        asked.append(path)
        if len(asked) == 2:
            over.wait(20)
        return answer(path, headers)

    with http_server(respond) as port:
        code, result = ask("server", OPENCODE_SERVER_URL=url(port))
        over.set()
    assert (code, result["state"]) == (0, "ok")
    assert asked[1:] == ["/global/health", "/global/health", "/config", "/config/providers"]
    assert result["seconds"] < 4.5, "half of the time was left for the rest"


def test_falkordb_counts_its_graphs() -> None:
    with redis_server(graph=True, password=SECRET) as port:
        env = {"FALKORDB_HOST": "127.0.0.1", "FALKORDB_PORT": str(port)}
        code, result = ask("falkordb", **env, FALKORDB_PASSWORD=SECRET)
        assert (code, result["state"], result["graphs"]) == (0, "ok", 0)
        assert result["version"].startswith("4.")
        redis(port, "AUTH", SECRET)
        redis(port, "AUTH", SECRET, then=("GRAPH.QUERY", "g", "CREATE (:N)"))
        redis(
            port,
            "AUTH",
            SECRET,
            then=("ACL", "SETUSER", "reader", "on", f">{SECRET}x", "~*", "+@all"),
        )
        _, result = ask(
            "falkordb", **env, FALKORDB_USERNAME="reader", FALKORDB_PASSWORD=f"{SECRET}x"
        )
        assert (result["state"], result["graphs"]) == ("ok", 1)
        code, result = ask("falkordb", **env)
        assert (code, result["state"]) == (2, "failing")
        assert "requires FALKORDB_PASSWORD" in result["detail"]
        code, result = ask("falkordb", **env, FALKORDB_PASSWORD=f"{SECRET}!")
        assert (code, result["state"]) == (2, "failing")
        assert "rejects FALKORDB_PASSWORD" in result["detail"]
        code, result = ask("falkordb", **env, FALKORDB_PASSWORD=SECRET, FALKORDB_TLS="true")
        assert (code, result["state"]) == (2, "failing")


def redis(port: int, *words: str, then: tuple[str, ...] = ()) -> None:
    """Send one or two commands on one connection; each must succeed."""
    with socket.create_connection(("127.0.0.1", port), 5) as sock:
        for command in filter(None, (words, then)):
            raw = [word.encode() for word in command]
            sock.sendall(
                b"*%d\r\n" % len(raw)
                + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in raw)
            )
            assert sock.recv(65536)[:1] in (b"+", b"*")


def test_a_redis_is_no_falkordb_but_stands_in_for_valkey() -> None:
    with redis_server() as port:
        code, result = ask("falkordb", FALKORDB_PORT=str(port))
        assert (code, result["state"]) == (2, "failing")
        assert "without FalkorDB's graph module" in result["detail"]
        code, result = ask("valkey", VALKEY_PORT=str(port))
        assert (code, result["state"], result["kind"]) == (0, "ok", "redis")
        assert result["used_memory"] > 100_000
        code, result = ask("valkey", VALKEY_PORT=str(port), VALKEY_PASSWORD=SECRET)
        assert (code, result["state"]) == (2, "failing")
        assert "rejects VALKEY_PASSWORD" in result["detail"]


class ValkeyHandler(socketserver.StreamRequestHandler):
    """Answers what redis-py sends: CLIENT SETINFO, PING and INFO, as Valkey does."""

    def handle(self) -> None:
        info = b"server_name:valkey\r\nredis_version:7.2.4\r\nvalkey_version:8.1.0\r\nused_memory:1048576\r\n"
        answers = {b"SETINFO": b"+OK\r\n", b"PING": b"+PONG\r\n"}
        answers[b"INFO"] = b"$%d\r\n%b\r\n" % (len(info), info)
        for line in self.rfile:
            self.wfile.write(answers.get(line.strip().upper(), b""))


def test_valkey_is_told_from_redis() -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), ValkeyHandler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        code, result = ask("valkey", VALKEY_PORT=str(server.server_address[1]))
        server.shutdown()
        thread.join()
    assert (code, result["kind"], result["version"], result["used_memory"]) == (
        0,
        "valkey",
        "8.1.0",
        1048576,
    )


@pytest.mark.parametrize("part", ["falkordb", "valkey"])
def test_where_nothing_listens(part: str) -> None:
    name, port = part.upper(), str(free_port())
    assert ask(part, **{f"{name}_PORT": port})[1]["state"] == "absent"
    assert ask(part, **{f"{name}_PORT": port, f"{name}_HOST": ""})[0] == 0
    code, result = ask(part, **{f"{name}_PORT": port, f"{name}_HOST": "127.0.0.9"})
    assert (code, result["state"]) == (2, "failing"), "a host elsewhere was named by someone"
    code, result = ask(part, **{f"{name}_PORT": "tcp://10.0.0.1:6379"})
    assert code == 2
    assert result["detail"].startswith(f"invalid configuration: {name}_PORT=tcp://10.0.0.1:6379: ")
    assert "enableServiceLinks: false" in result["detail"]
    code, result = ask(part, **{f"{name}_HOST": "no-such-host.invalid"})
    assert (code, result["state"]) == (2, "failing")


@pytest.mark.parametrize(
    "env",
    [
        lambda port: {"OPENCODE_SERVER_URL": url(port), "OPENCODE_SERVER_PASSWORD": SECRET},
        lambda port: {"FALKORDB_PORT": str(port), "FALKORDB_PASSWORD": SECRET},
        lambda port: {"VALKEY_PORT": str(port), "VALKEY_USERNAME": "u", "VALKEY_PASSWORD": SECRET},
        lambda port: {"DD_TRACE_AGENT_URL": f"http://u:{SECRET[:4]}@localhost:{port}"},
    ],
)
def test_what_hands_the_password_back_does_not_get_it_printed(
    env: Callable[[int], dict[str, str]],
) -> None:
    with silent_server(echo=True) as port:
        variables = env(port)
        part = {"OPENCODE": "server", "DD": "datadog"}.get(
            name := next(iter(variables)).split("_")[0], name.lower()
        )
        assert ask(part, "--timeout", "0.5", **variables)[1]["state"] == "failing"


def test_what_cannot_be_understood_is_not_printed() -> None:
    with silent_server(greeting=f":{SECRET}\r\n".encode()) as port:
        assert "unexpected response" in ask("falkordb", FALKORDB_PORT=str(port))[1]["detail"]


def agent(path: str, _headers: Mapping[str, str]) -> Reply:
    return (
        (200, b'{"version": "7.60.1", "endpoints": ["/v0.4/traces"]}')
        if path == "/info"
        else (404, b"")
    )


def test_the_datadog_agent(tmp_path: Path) -> None:
    code, result = ask("datadog")
    assert (code, result["state"]) == (0, "absent")
    assert "not configured" in result["detail"]
    with http_server(agent) as port:
        code, result = ask("datadog", DD_AGENT_HOST="localhost", DD_TRACE_AGENT_PORT=str(port))
        assert (code, result["state"], result["version"]) == (0, "ok", "7.60.1")
        assert ask("datadog", DD_TRACE_AGENT_URL=url(port))[1]["state"] == "ok"
    with http_server(agent, unix=str(tmp_path / "apm.socket")):
        assert (
            ask("datadog", DD_TRACE_AGENT_URL=f"unix://{tmp_path}/apm.socket")[1]["version"]
            == "7.60.1"
        )
    with http_server(lambda _path, _headers: (200, b"{}")) as port:
        code, result = ask("datadog", DD_TRACE_AGENT_URL=url(port))
        assert (code, result["detail"]) == (2, "/info is not the answer of a Datadog Agent")
    code, result = ask("datadog", DD_TRACE_AGENT_URL=url(free_port()))
    assert (code, result["state"]) == (2, "failing")


def tools(directory: Path, **programs: str) -> dict[str, str]:
    """Make programs that run these shell commands; return the environment that finds them."""
    for name, script in programs.items():
        program = directory / name.replace("_", "-")
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    return {"PATH": f"{directory}:/bin:/usr/bin"}


RCLONE = "echo rclone v1.60.1-DEV; echo - os/version: debian 12.0"
REDIS_CLI = "echo redis-cli 7.0.15"


def test_the_backup_tools(tmp_path: Path) -> None:
    env = tools(tmp_path, rclone=RCLONE, redis_cli=REDIS_CLI)
    code, result = ask("backup", **env)
    assert (code, result["state"], result["remotes"]) == (0, "ok", "none configured")
    assert (result["rclone"], result["redis-cli"]) == ("1.60.1", "7.0.15")
    remote = {
        "RCLONE_CONFIG_OFF_SITE_TYPE": "b2",
        "RCLONE_CONFIG_C_TYPE": "crypt",
        "RCLONE_CONFIG_OFF_SITE_ACCOUNT": "a",
    }
    code, result = ask("backup", **env, **remote)
    assert (code, result["detail"]) == (2, "RCLONE_CONFIG_OFF_SITE_KEY is not set")
    code, result = ask("backup", **env, **remote, RCLONE_CONFIG_OFF_SITE_KEY=SECRET)
    assert (code, result["remotes"]) == (0, "off_site")


@pytest.mark.parametrize(
    ("programs", "detail"),
    [
        ({"rclone": "echo rclone v1.60.1; exit 3"}, "rclone does not run (CalledProcessError)"),
        (
            {"rclone": RCLONE, "redis_cli": "exec tail -f /dev/null"},
            "redis-cli does not run (TimeoutExpired)",
        ),
        ({}, "rclone does not run (FileNotFoundError)"),
    ],
)
def test_a_backup_tool_is_missing_fails_or_hangs(
    tmp_path: Path, programs: dict[str, str], detail: str
) -> None:
    env = tools(tmp_path, **programs)
    if not programs:
        env["PATH"] = str(tmp_path)
    code, result = ask("backup", "--timeout", "0.5", **env)
    assert (code, result["detail"]) == (2, detail)


def test_all_are_asked_at_the_same_time_and_none_is_waited_for_longer_than_told() -> None:
    with silent_server() as port:
        began = time.monotonic()
        done = run(
            "--timeout",
            "1",
            OPENCODE_SERVER_URL=url(port),
            FALKORDB_PORT=str(port),
            VALKEY_PORT=str(port),
            DD_AGENT_HOST="localhost",
            DD_TRACE_AGENT_PORT=str(port),
        )
        seconds = time.monotonic() - began
    assert done.returncode == 1
    assert 1 <= seconds < 2.5
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["server", "falkordb", "valkey", "datadog", "backup"]
    assert all(line[1:] == ["failing", "no response within 1 s"] for line in lines[:4])


def test_a_failing_part_is_two_and_a_failing_server_goes_first() -> None:
    with http_server(opencode()) as good, silent_server(greeting=b"SSH-2.0-x\r\n") as stranger:
        env = {
            "VALKEY_PORT": str(stranger),
            "FALKORDB_PORT": str(free_port()),
            "OPENCODE_SERVER_URL": url(good),
        }
        done = run("valkey", "server", "falkordb", **env)
        assert done.returncode == 2
        assert [line.split()[:2] for line in done.stdout.splitlines()] == [
            ["server", "ok"],
            ["falkordb", "absent"],
            ["valkey", "failing"],
        ]
        assert run("server", "falkordb", **env).returncode == 0
        assert (
            run("server", "valkey", **{**env, "OPENCODE_SERVER_URL": url(free_port())}).returncode
            == 1
        )


@pytest.mark.parametrize(
    "words", [["nothing"], ["--timeout", "0"], ["--timeout", "nan"], ["--timeout", "x"], ["--x"]]
)
def test_a_wrong_command_line_has_its_own_code(words: list[str]) -> None:
    done = run(*words)
    assert done.returncode == 64
    assert "error: " in done.stderr


def test_help_names_every_part_and_variable() -> None:
    done = run("--help")
    assert done.returncode == 0
    for word in (
        "server",
        "falkordb",
        "valkey",
        "datadog",
        "backup",
        "DD_TRACE_AGENT_URL",
        "--timeout",
        "64",
    ):
        assert word in done.stdout
