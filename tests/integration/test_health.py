"""The image's health check against a real HTTP server with basic authentication."""

import base64
import contextlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.servers import Reply, free_port, http_server

HEALTH = Path(__file__).parents[2] / "scripts" / "health"
SECRET = "secret"  # noqa: S105 -- of a server that a test makes
AWKWARD = [
    "plain",
    "a b  c ",
    "'single' \"double\"",
    "back\\slash\\\\n\\",
    "$HOME ${x} `id` $(id)",
    "pässwörd→密",
    "%s%d%%",
    "# -x: ;&|*?[a]~",
    "tab\there",
    'user = "x"',
    "-",
]


@pytest.fixture(params=["dash", "bash"])
def shell(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def health(shell: str, port: int, **env: str) -> subprocess.CompletedProcess[str]:
    url = f"http://127.0.0.1:{port}/config"
    return subprocess.run(
        [shell, HEALTH, url],
        env={"PATH": os.environ["PATH"], **env},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def token(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize("password", AWKWARD)
def test_the_password_arrives_as_it_is_and_is_in_no_argv(
    shell: str, password: str, tmp_path: Path
) -> None:
    user = "opencode" if password == AWKWARD[0] else 'o"p\\e n'
    argvs: list[bytes] = []
    mark = f"HEALTH_OF={tmp_path}"

    def respond(_path: str, headers: Mapping[str, str]) -> Reply:
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (
                    mark.encode() in (process / "environ").read_bytes()
                ):  # others on this machine are none of ours
                    argvs.append((process / "cmdline").read_bytes())
        return (200 if headers.get("Authorization") == token(user, password) else 401), b"{}"

    # curl wipes what it knows as a secret from its own argv, but `ps` may be quicker: so its first
    # argv is kept too.
    given = tmp_path / "given"
    for program in ("curl", "sed"):
        (tmp_path / program).write_text(
            f'#!/bin/sh\nprintf \'%s\\n\' "$@" >>{given}\nexec {shutil.which(program)} "$@"\n'
        )
        (tmp_path / program).chmod(0o755)
    names = {"HEALTH_OF": str(tmp_path)}
    if user != "opencode":
        names["OPENCODE_SERVER_USERNAME"] = user
    with http_server(respond) as port:
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = health(shell, port, OPENCODE_SERVER_PASSWORD=password, PATH=path, **names)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert any(b"curl" in argv for argv in argvs), "the process list was not read while curl ran"
    argvs.append(given.read_bytes())
    assert b"--config" in argvs[-1]
    escaped = password.replace("\\", "\\\\").replace('"', '\\"')
    for secret in {f"{user}:{password}", f":{escaped}", token(user, password)[6:]}:
        assert not any(secret.encode() in argv for argv in argvs)


@pytest.mark.parametrize("status", [401, 404, 500, 503])
def test_any_other_answer_is_one(shell: str, status: int) -> None:
    with http_server(lambda _path, _headers: (status, b"a page" * 1000)) as port:
        done = health(shell, port, OPENCODE_SERVER_PASSWORD=SECRET)
    assert done.returncode == 1
    assert done.stdout == ""
    assert str(status) in done.stderr
    assert len(done.stderr) < 500


def test_nothing_listens(shell: str) -> None:
    done = health(shell, free_port(), OPENCODE_SERVER_PASSWORD=SECRET)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["OPENCODE_SERVER_PASSWORD", "OPENCODE_SERVER_USERNAME"])
def test_a_line_break_is_refused_with_a_sentence(shell: str, name: str) -> None:
    asked: list[str] = []

    def respond(path: str, _headers: Mapping[str, str]) -> Reply:
        asked.append(path)
        return 200, b"{}"

    with http_server(respond) as port:
        done = health(shell, port, **{"OPENCODE_SERVER_PASSWORD": "x", name: "two\nlines"})
    assert done.returncode == 1
    assert "line break" in done.stderr
    assert "two" not in done.stderr
    assert not asked


def test_neither_a_proxy_nor_a_curlrc_comes_between(shell: str, tmp_path: Path) -> None:
    (tmp_path / ".curlrc").write_text("write-out = noise\n")
    with http_server(lambda _path, _headers: (200, b"{}")) as port:
        done = health(
            shell,
            port,
            OPENCODE_SERVER_PASSWORD=SECRET,
            http_proxy="http://127.0.0.1:1",
            HOME=str(tmp_path),
        )
    assert (done.returncode, done.stdout) == (0, "")
