"""Fetch against real git servers on loopback that misbehave on request."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import stamina
from rich.console import Console

from pipeline.core import console, errors
from pipeline.core.settings import ROOT, Settings
from pipeline.inputs import git as gitcommand
from pipeline.inputs import openagents
from tests.integration.gitserver import Fault, Server, serve

pytestmark = pytest.mark.server

AGENT = ".opencode/agent/core/one.md"
SETTINGS = {"network": {"attempts": 2, "stall_seconds": 1}}
DRIVER = """
import json, os, signal, sys
from pathlib import Path
from pipeline.core import errors, process
from pipeline.inputs import git as gitcommand
from pipeline.inputs import openagents
from pipeline.core.settings import Settings
pin, vendor, settings, options, prelude = sys.argv[1:]
openagents.PIN = Path(pin)
exec(prelude)
try:
    with process.interruptible():
        openagents.fetch(Settings(**json.loads(settings)), vendor=Path(vendor), **json.loads(options))
except errors.PipelineError as error:
    print(error.message, file=sys.stderr)
    sys.exit(error.code)
"""


def git(where: Path, *words: str) -> str:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "init.defaultBranch=main")
    return subprocess.run(
        ["git", *who, *words], cwd=where, check=True, capture_output=True, text=True
    ).stdout.strip()


class Upstream:
    """Repositories to fetch: agents (one, two on main; next; fat; tag v1 on one), other (no such
    commits), bare.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.one = self.commit("agents", "one", 300_000)
        git(root / "agents", "tag", "-a", "v1", "-m", "v1")
        self.two = self.commit("agents", "two", 300_000)
        git(root / "agents", "checkout", "-q", "-b", "next")
        self.next = self.commit("agents", "next", 10)
        git(root / "agents", "checkout", "-q", "-b", "fat")
        self.fat = self.commit("agents", "fat", 9_000_000)
        git(root / "agents", "checkout", "-q", "main")
        self.other = self.commit("other one", "other", 10)
        (root / "plain").mkdir()
        git(root / "plain", "init", "-q")
        git(root / "plain", "commit", "-q", "--allow-empty", "-m", "nothing")

    def commit(self, name: str, text: str, size: int) -> str:
        repo = self.root / name
        if not repo.exists():
            repo.mkdir()
            git(repo, "init", "-q")
        (repo / AGENT).parent.mkdir(parents=True, exist_ok=True)
        (repo / AGENT).write_text(text)
        (repo / ".gitignore").write_text("ignored\n")
        (repo / "run.sh").write_text("true\n")
        (repo / "run.sh").chmod(0o755)
        (repo / "big").write_bytes(os.urandom(size))
        git(repo, "add", "-A")
        git(repo, "commit", "-q", "-m", text)
        return git(repo, "rev-parse", "HEAD")


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Upstream:
    return Upstream(tmp_path_factory.mktemp("upstream"))


@pytest.fixture
def server(upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in (
        "http_proxy",
        "HTTP_PROXY",
        "https_proxy",
        "HTTPS_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    with serve(upstream.root) as running:
        pin = tmp_path / "pin.json"
        pin.write_text(
            json.dumps({"url": f"{running.url}/agents", "ref": "main", "commit": upstream.one})
        )
        monkeypatch.setattr(openagents, "PIN", pin)
        yield running


@pytest.fixture(autouse=True)
def _no_back_off(request: pytest.FixtureRequest) -> Iterator[None]:
    with stamina.set_testing("outlived" not in request.node.name, attempts=2, cap=True):
        yield


@pytest.fixture
def vendor(tmp_path: Path) -> Path:
    return tmp_path / "vendor"


@pytest.fixture
def fetched(server: Server, vendor: Path) -> openagents.Record:
    """OpenAgents at the pin, put there by an ordinary fetch."""
    record = fetch(vendor)
    server.requests = 0
    return record


def fetch(vendor: Path, **options: Any) -> openagents.Record:
    return openagents.fetch(Settings.model_validate(SETTINGS), vendor=vendor, **options)


def start(
    vendor: Path,
    prelude: str = "",
    before: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
    **options: Any,
) -> subprocess.Popen[str]:
    words = [
        str(openagents.PIN),
        str(vendor),
        json.dumps(SETTINGS | {"network": {"stall_seconds": 20}}),
    ]
    return subprocess.Popen(
        [*before, sys.executable, "-c", DRIVER, *words, json.dumps(options), prelude],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def assert_untouched(vendor: Path, record: openagents.Record | None) -> None:
    assert openagents.read(vendor) == record
    assert not list(vendor.glob(".incoming-*"))
    if record:
        assert openagents.tree_hash(vendor / "OpenAgents") == record.tree


def test_the_pin_arrives_shallow_and_recorded(
    server: Server, vendor: Path, upstream: Upstream
) -> None:
    record = fetch(vendor)
    place = vendor / "OpenAgents"
    assert (record.kind, record.url, record.ref, record.commit) == (
        "openagents",
        f"{server.url}/agents",
        "main",
        upstream.one,
    )
    assert abs(time.time() - datetime.fromisoformat(record.fetched).timestamp()) < 60
    assert git(place, "rev-parse", "HEAD") == upstream.one
    assert git(place, "rev-list", "--count", "--all", "HEAD") == "1"
    assert git(place, "status", "--porcelain") == ""
    assert (place / "run.sh").stat().st_mode & 0o111
    assert place.stat().st_mode & 0o777 == (vendor.stat().st_mode & 0o777)
    assert_untouched(vendor, record)


@pytest.mark.parametrize(
    ("options", "commit", "ref"),
    [
        ({"ref": "next"}, "next", "next"),
        ({"ref": "v1"}, "one", "v1"),
        ({"latest": True}, "two", "main"),
        ({"ref": "next", "latest": True}, "next", "next"),
        ({"ref": "COMMIT"}, "two", "COMMIT"),
    ],
)
def test_ref_and_latest_replace_the_pin(
    server: Server, vendor: Path, upstream: Upstream, options: dict[str, Any], commit: str, ref: str
) -> None:
    wanted = getattr(upstream, commit)
    options = {name: wanted if value == "COMMIT" else value for name, value in options.items()}
    record = fetch(vendor, **options)
    assert (record.commit, record.ref) == (wanted, ref.replace("COMMIT", wanted))
    assert (vendor / "OpenAgents" / AGENT).read_text() == commit
    assert git(vendor / "OpenAgents", "rev-list", "--count", "HEAD") == "1"
    server.requests = 0
    assert fetch(vendor, **options) == record
    assert server.requests <= 2  # a branch has to be asked for; nothing is transferred


@pytest.mark.usefixtures("server")
def test_a_users_git_configuration_changes_no_bytes(
    vendor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gitconfig").write_text("[core]\n\tautocrlf = true\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    fetch(vendor)
    assert (vendor / "OpenAgents/run.sh").read_bytes() == b"true\n"


def test_settings_replace_the_pin_and_arguments_replace_them(
    server: Server, vendor: Path, upstream: Upstream
) -> None:
    elsewhere = {"url": f"{server.url}/nonesuch", "ref": "next"}
    settings = Settings.model_validate(SETTINGS | {"openagents": elsewhere})
    assert (
        openagents.fetch(settings, url=f"{server.url}/agents", vendor=vendor).commit
        == upstream.next
    )
    with pytest.raises(errors.NoSuchRepository):
        openagents.fetch(settings, ref="main", vendor=vendor)


def test_nothing_to_do_needs_no_network_and_no_time(
    server: Server, vendor: Path, fetched: openagents.Record
) -> None:
    began = time.monotonic()
    assert fetch(vendor) == fetched
    assert time.monotonic() - began < 0.3
    assert server.requests == 0


def test_a_url_without_the_pin_gives_its_default_branch(
    server: Server, vendor: Path, upstream: Upstream, capsys: pytest.CaptureFixture[str]
) -> None:
    url = str(upstream.root / "other one")  # a path, with a space
    record = fetch(vendor, url=url)
    assert (record.commit, record.ref) == (upstream.other, "main")
    assert record.url == (upstream.root / "other one").as_uri()
    assert f"does not have the pinned {upstream.one[:7]}" in capsys.readouterr().out
    assert fetch(vendor, url=url) == record
    assert server.requests == 0
    assert_untouched(vendor, record)


def test_a_url_with_the_pin_gives_the_pin(server: Server, vendor: Path, upstream: Upstream) -> None:
    assert fetch(vendor, url=str(upstream.root / "agents")).commit == upstream.one
    assert git(vendor / "OpenAgents", "rev-list", "--count", "HEAD") == "1"
    assert server.requests == 0


def test_a_server_without_single_commits_gives_the_head_of_a_branch(
    server: Server, vendor: Path, upstream: Upstream
) -> None:
    server.old = True
    parent = git(upstream.root / "agents", "rev-parse", "next~1")
    git(upstream.root / "agents", "update-ref", "refs/heads/main", upstream.next)
    try:
        with pytest.raises(errors.NoSuchRef, match="--ref"):
            fetch(vendor, ref=parent)
        assert fetch(vendor, ref="next").commit == upstream.next
        # The pin is no tip any more, and is found in the history of its branch.
        assert fetch(vendor).commit == upstream.one
    finally:
        git(upstream.root / "agents", "update-ref", "refs/heads/main", upstream.two)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault("status", 401), (errors.NoSuchRepository, 1)),
        (Fault("status", 403), (errors.NoSuchRepository, 1)),
        (Fault("status", 404), (errors.NoSuchRepository, 1)),
        (Fault("status", 500), (errors.GitHostUnreachable, 2)),
        (Fault("silence"), (errors.GitHostUnreachable, 2)),
        (Fault("silence", after=100_000), (errors.GitHostUnreachable, 4)),
        (Fault("cut"), (errors.GitHostUnreachable, 2)),
        (Fault("cut", after=100_000), (errors.GitHostUnreachable, 4)),
    ],
    ids=lambda value: (
        f"{value.kind}-{value.status}-{value.after}" if isinstance(value, Fault) else ""
    ),
)
def test_what_the_host_does_is_named_and_the_old_tree_stays(
    server: Server,
    vendor: Path,
    upstream: Upstream,
    fetched: openagents.Record,
    fault: Fault,
    expected: tuple[type[errors.PipelineError], int],
) -> None:
    failure, requests = expected
    server.spoil(Fault(**vars(fault)))
    with pytest.raises(failure) as caught:
        fetch(vendor, ref=upstream.two)
    assert type(caught.value) is failure
    assert server.url in caught.value.what
    assert server.requests == requests  # transient ones are tried twice, the others once
    assert_untouched(vendor, fetched)


@pytest.mark.parametrize(
    "fault", [Fault("status", 503, times=1), Fault("cut", after=100_000, times=1)]
)
def test_a_fault_that_passes_is_outlived(
    server: Server, vendor: Path, upstream: Upstream, fault: Fault
) -> None:
    server.spoil(Fault(**vars(fault)))
    assert fetch(vendor).commit == upstream.one


@pytest.mark.parametrize("ref", ["nonesuch", "1" * 40, "--upload-pack=true", "a..b", "refs/*"])
def test_a_ref_that_does_not_exist(
    server: Server, vendor: Path, fetched: openagents.Record, ref: str
) -> None:
    assert server.url
    with pytest.raises(errors.NoSuchRef):
        fetch(vendor, ref=ref)
    assert_untouched(vendor, fetched)


def test_a_repository_without_agents(
    server: Server, vendor: Path, fetched: openagents.Record
) -> None:
    with pytest.raises(errors.NotOpenAgents):
        fetch(vendor, url=f"{server.url}/plain", latest=True)
    assert_untouched(vendor, fetched)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


def _link_through_a_link(repo: Path) -> None:
    (repo / "a/b").mkdir(parents=True)
    (repo / "a/b/top").symlink_to("../..")
    (repo / "l").symlink_to("a/b/top/../passwd")


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "lfs": (lambda repo: (repo / AGENT).write_text(POINTER), f"{AGENT} is a pointer of Git LFS"),
    "submodule": (
        lambda repo: git(
            repo, "update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},.opencode/team"
        ),
        ".opencode/team is a git submodule",
    ),
    "absolute link": (
        lambda repo: (repo / "l").symlink_to("/etc/passwd"),
        "l links to /etc/passwd",
    ),
    "link through a link": (
        _link_through_a_link,
        "l links to a/b/top/../passwd",
    ),
    "record": (
        lambda repo: (repo / ".fetched.json").symlink_to("../../outside"),
        ".fetched.json is",
    ),
    "escape": (lambda repo: (repo / "a\x1b[2Kb").write_text(""), "ab is not a name"),
    "newline": (lambda repo: (repo / "a\nok    b").write_text(""), "a ok    b is not a name"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_repository_that_cannot_be_built_as_it_is(
    server: Server, vendor: Path, upstream: Upstream, kind: str, fetched: openagents.Record
) -> None:
    make, sentence = HOSTILE[kind]
    repo = upstream.root / f"hostile-{kind.replace(' ', '-')}"
    git(upstream.root, "clone", "-q", "agents", repo.name)
    make(repo)
    git(repo, "add", "-A", *([":!.opencode/team"] if kind == "submodule" else []))
    git(repo, "commit", "-q", "-m", "\x1b[2K")
    with pytest.raises(errors.NotOpenAgents) as caught:
        fetch(vendor, url=f"{server.url}/{repo.name}", latest=True)
    assert sentence in caught.value.what
    assert "\x1b" not in str(caught.value)
    assert_untouched(vendor, fetched)
    assert not (vendor / "outside").exists()


def test_what_is_harmless_is_taken(server: Server, vendor: Path, upstream: Upstream) -> None:
    repo = upstream.root / "harmless"
    git(upstream.root, "clone", "-q", "agents", repo.name)
    (repo / ".gitmodules").write_text('[submodule "x"]\n\tpath = x\n\turl = ext::touch /tmp/x\n')
    (repo / "ünï cödé 👩‍💻.md").symlink_to(AGENT)
    (repo / "about lfs.md").write_text(f"A pointer begins with:\n{POINTER}")
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "harmless")
    record = fetch(vendor, url=f"{server.url}/harmless", ref="main")
    assert (vendor / "OpenAgents/ünï cödé 👩‍💻.md").read_text() == "two"
    assert_untouched(vendor, record)


def test_a_repository_that_moved_is_found_where_it_is_now(
    server: Server,
    vendor: Path,
    upstream: Upstream,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gone = f"{server.url}/gone"
    with pytest.raises(errors.NoSuchRepository):
        fetch(vendor, url=gone, ref="main")
    monkeypatch.setitem(gitcommand.MOVED, gone, f"{server.url}/agents")
    assert fetch(vendor, url=gone, ref="main").commit == upstream.two
    assert f"trying {server.url}/agents" in capsys.readouterr().out


@pytest.mark.parametrize("url", ["/nonesuch/repo", "ext::sh -c true", "gopher://127.0.0.1/x"])
@pytest.mark.usefixtures("server")
def test_a_url_that_is_no_repository(vendor: Path, url: str) -> None:
    with pytest.raises(errors.NoSuchRepository):
        fetch(vendor, url=url)
    assert_untouched(vendor, None)


@pytest.mark.usefixtures("server")
def test_a_server_of_another_protocol_that_accepts_and_never_answers(vendor: Path) -> None:
    one_try = stamina.set_testing(True, attempts=1)
    with (
        one_try,
        socket.create_server(("127.0.0.1", 0)) as mute,
        pytest.raises(errors.GitHostUnreachable, match="no data for"),
    ):
        fetch(vendor, url=f"git://127.0.0.1:{mute.getsockname()[1]}/agents", starter=False)
    assert_untouched(vendor, None)


def test_the_starter_stands_in_until_the_host_answers(
    server: Server, vendor: Path, upstream: Upstream, capsys: pytest.CaptureFixture[str]
) -> None:
    server.spoil(Fault("status", 502))
    with pytest.raises(errors.GitHostUnreachable):
        fetch(vendor, starter=False)
    assert_untouched(vendor, None)
    capsys.readouterr()
    record = fetch(vendor)
    assert capsys.readouterr().out.count("!!  ") == 4
    assert (record.kind, record.commit) == ("starter", "starter")
    assert (vendor / "OpenAgents/.opencode/agent/core/builder.md").is_file()
    assert_untouched(vendor, record)
    assert fetch(vendor) == record
    assert capsys.readouterr().out.count("!!  ") == 4
    server.heal()
    assert fetch(vendor).commit == upstream.one
    assert not (vendor / "OpenAgents/VERSION").exists()


def test_the_starter_follows_a_transfer_that_was_cut(server: Server, vendor: Path) -> None:
    server.spoil(Fault("cut", after=100_000))
    record = fetch(vendor)
    assert record.kind == "starter"
    assert not (vendor / "OpenAgents/.git").exists()
    assert_untouched(vendor, record)


def test_an_edited_starter_is_not_thrown_away(
    server: Server, vendor: Path, upstream: Upstream
) -> None:
    server.spoil(Fault("status", 502))
    record = fetch(vendor)
    edited = vendor / "OpenAgents/.opencode/agent/core/builder.md"
    edited.write_text("mine")
    assert fetch(vendor) == record
    server.heal()
    with pytest.raises(errors.LocalEdits) as caught:
        fetch(vendor)
    assert "inv fetch --force" in caught.value.remedy
    assert edited.read_text() == "mine"
    assert fetch(vendor, force=True).commit == upstream.one


def _branch(place: Path) -> None:
    git(place, "checkout", "-q", "-b", "mine")


EDITS: dict[str, Callable[[Path], object]] = {
    "changed": lambda place: (place / AGENT).write_text("mine"),
    "untracked": lambda place: (place / "mine").write_text("mine"),
    "ignored": lambda place: (place / "ignored").write_text("mine"),
    "removed": lambda place: (place / "big").unlink(),
    "mode": lambda place: (place / "run.sh").chmod(0o644),
    "link": lambda place: (place / "link").symlink_to("/nonesuch"),
    "branch": _branch,
}


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.usefixtures("server")
def test_local_edits_are_kept(
    vendor: Path, upstream: Upstream, fetched: openagents.Record, kind: str
) -> None:
    EDITS[kind](vendor / "OpenAgents")
    edited = openagents.tree_hash(vendor / "OpenAgents")
    assert fetch(vendor) == fetched  # what is wanted is there: no reason to touch it
    with pytest.raises(errors.LocalEdits, match="status --ignored"):
        fetch(vendor, latest=True)
    assert openagents.tree_hash(vendor / "OpenAgents") == edited
    assert fetch(vendor, latest=True, force=True).commit == upstream.two


@pytest.mark.usefixtures("server")
def test_force_restores_an_edited_tree(vendor: Path, fetched: openagents.Record) -> None:
    (vendor / "OpenAgents" / AGENT).write_text("mine")
    assert fetch(vendor, force=True).tree == fetched.tree
    assert (vendor / "OpenAgents" / AGENT).read_text() == "one"


@pytest.mark.usefixtures("server")
def test_half_there(vendor: Path, upstream: Upstream, fetched: openagents.Record) -> None:
    place = vendor / "OpenAgents"
    (place / AGENT).unlink()
    with pytest.raises(errors.NothingFetched, match="incomplete"):
        openagents.read(vendor)
    assert fetch(vendor).tree == fetched.tree  # only files are missing: nothing is lost
    (place / ".fetched.json").write_text("{")
    with pytest.raises(errors.NothingFetched):
        openagents.read(vendor)
    (place / "mine").write_text("mine")
    with pytest.raises(errors.LocalEdits):
        fetch(vendor)
    (place / "mine").unlink()
    (place / ".fetched.json").unlink()
    with pytest.raises(errors.NothingFetched):
        openagents.read(vendor)
    git(place, "branch", "main")
    with pytest.raises(errors.LocalEdits):  # somebody's own clone
        fetch(vendor)
    git(place, "branch", "-D", "main")
    assert fetch(vendor).commit == upstream.one
    (place / ".fetched.json").unlink()
    shutil.rmtree(place / ".git")
    with pytest.raises(errors.LocalEdits):  # an unpacked archive
        fetch(vendor)
    assert (place / AGENT).read_text() == "one"
    assert fetch(vendor, force=True).commit == upstream.one


@pytest.mark.usefixtures("server")
def test_an_empty_directory_is_nothing(vendor: Path, upstream: Upstream) -> None:
    (vendor / "OpenAgents").mkdir(parents=True)
    assert openagents.read(vendor) is None
    assert fetch(vendor).commit == upstream.one


@pytest.mark.usefixtures("server")
def test_a_fetch_in_a_git_hook_leaves_the_users_repository_alone(
    vendor: Path, upstream: Upstream, tmp_path: Path
) -> None:
    """git gives a hook in a linked worktree all of these, see githooks(5)."""
    main, linked = tmp_path / "main", tmp_path / "linked"
    main.mkdir()
    git(main, "init", "-q")
    git(main, "commit", "-q", "--allow-empty", "-m", "mine")
    git(main, "worktree", "add", "-q", str(linked))
    private = git(linked, "rev-parse", "--absolute-git-dir")
    names = git(main, "rev-parse", "--local-env-vars").split()
    env = dict.fromkeys({*names, "GIT_QUARANTINE_PATH", "GIT_NAMESPACE"}, private)
    env |= {"GIT_INDEX_FILE": f"{private}/index", "GIT_COMMON_DIR": str(main / ".git")}
    # Settings are no place, and reach git.
    env |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "user.name", "GIT_CONFIG_VALUE_0": "me"}
    env["GIT_CONFIG_PARAMETERS"] = "'user.name=me'"
    before = sorted((path, path.read_bytes()) for path in main.rglob("*") if path.is_file())
    child = start(vendor, env=env, ref=upstream.two)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 0, said
    assert before == sorted((path, path.read_bytes()) for path in main.rglob("*") if path.is_file())
    assert git(linked, "status", "--porcelain") == ""
    assert git(vendor / "OpenAgents", "rev-parse", "HEAD") == upstream.two


@pytest.mark.parametrize("name", ["vendor", "vendor/OpenAgents"])
@pytest.mark.parametrize("kind", ["file", "symlink"])
@pytest.mark.usefixtures("server")
def test_vendor_is_no_directory_of_ours(tmp_path: Path, vendor: Path, name: str, kind: str) -> None:
    path, outside = tmp_path / name, tmp_path / "outside"
    path.parent.mkdir(exist_ok=True)
    outside.mkdir()
    if kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to(outside)
    with pytest.raises(errors.VendorUnusable):
        fetch(vendor)
    assert not list(outside.iterdir())
    assert path.is_symlink() or path.read_text() == "mine"


def in_mounts(script: str) -> tuple[str, ...]:
    """Run what follows in mounts of its own, which end with it."""
    return (
        "unshare",
        *(["-r"] if os.geteuid() else []),
        "-m",
        "sh",
        "-ec",
        f'{script}; exec "$@"',
        "sh",
    )


@pytest.mark.usefixtures("server")
def test_read_only_vendor(vendor: Path, upstream: Upstream, fetched: openagents.Record) -> None:
    before = in_mounts(f"mount --bind {vendor} {vendor}; mount -o remount,ro,bind {vendor}")
    child = start(vendor, before=before, ref=upstream.two)
    _, said = child.communicate(timeout=60)
    assert child.returncode == errors.VendorUnusable.exit_code, said
    assert_untouched(vendor, fetched)
    child = start(vendor, before=before)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 0, said  # nothing to do needs no writing


@pytest.mark.parametrize("megabytes", [6, 14], ids=["transfer", "checkout"])
@pytest.mark.usefixtures("server")
def test_disk_full(
    vendor: Path, upstream: Upstream, fetched: openagents.Record, tmp_path: Path, megabytes: int
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    before = in_mounts(
        f'mount -t tmpfs -o size={megabytes}m tmpfs {copy}; cp -a {vendor}/. {copy}; set +e; "$@"; code=$?;'
        f" ls -A {copy}; cat {copy}/OpenAgents/.fetched.json; exit $code"
    )
    child = start(copy, before=before, ref=upstream.fat)
    out, said = child.communicate(timeout=60)
    assert child.returncode == errors.DiskFull.exit_code, said
    assert ".incoming" not in out
    assert fetched.model_dump_json(indent=2) in out


@pytest.mark.parametrize(
    ("number", "after"), [(signal.SIGTERM, 0), (signal.SIGTERM, 100_000), (signal.SIGKILL, 100_000)]
)
def test_killed_while_the_host_is_at_work(
    server: Server,
    vendor: Path,
    upstream: Upstream,
    fetched: openagents.Record,
    number: signal.Signals,
    after: int,
) -> None:
    server.spoil(Fault("silence", after=after))
    child = start(vendor, ref=upstream.two)
    eventually(server.silent.is_set, "the transfer began")
    assert list(vendor.glob(".incoming-*"))
    child.send_signal(number)
    child.communicate(timeout=20)
    if number == signal.SIGKILL:
        assert openagents.read(vendor) == fetched
    else:
        assert child.returncode == 128 + number
        assert_untouched(vendor, fetched)
    server.heal()
    assert_untouched(vendor, fetch(vendor, ref=upstream.two))


DIE = "os.kill(os.getpid(), signal.SIGKILL)"
TWO_RENAMES = "openagents.exchange = lambda *_: False; rename = Path.rename"
SWAPS = {
    "before the swap": (f"openagents.swap = lambda *_: {DIE}", "one"),
    "after the swap": (
        f"swap = openagents.swap; openagents.swap = lambda *a: (swap(*a), {DIE})",
        "two",
    ),
    "between two renames": (
        f"{TWO_RENAMES}; Path.rename = lambda *a: (rename(*a), a[0].name == 'OpenAgents' and {DIE})",
        "",
    ),
}


@pytest.mark.parametrize("moment", SWAPS)
@pytest.mark.usefixtures("server", "fetched")
def test_killed_around_the_swap(vendor: Path, upstream: Upstream, moment: str) -> None:
    prelude, left = SWAPS[moment]
    child = start(vendor, prelude, ref=upstream.two)
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    there = openagents.read(vendor)
    assert (there.commit if there else "") == (getattr(upstream, left) if left else "")
    with pytest.raises(errors.NoSuchRef):  # even a fetch that fails repairs what the dead one left
        fetch(vendor, ref="nonesuch")
    there = openagents.read(vendor)
    assert there is not None
    assert there.commit == getattr(upstream, left or "one")
    assert_untouched(vendor, there)
    assert fetch(vendor, ref=upstream.two).commit == upstream.two


@pytest.mark.usefixtures("server")
def test_interrupted_between_two_renames(
    vendor: Path, upstream: Upstream, fetched: openagents.Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def interrupt(self: Path, target: Path) -> Path:
        if target == vendor / "OpenAgents" and self.name == "OpenAgents":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(openagents, "exchange", lambda *_: False)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(vendor, ref=upstream.two)
    assert_untouched(vendor, fetched)
    assert_untouched(
        vendor, fetch(vendor, ref=upstream.two)
    )  # two renames do as well as one exchange


def test_two_at_once(server: Server, vendor: Path, upstream: Upstream) -> None:
    server.spoil(Fault("silence", after=100_000, times=1))
    first = start(vendor)
    eventually(server.silent.is_set, "the transfer began")
    second = start(vendor)
    assert second.stdout is not None
    assert second.stdout.readline() == "Another fetch is running: waiting for it.\n"
    server.heal()
    assert "is in vendor/OpenAgents" in first.communicate(timeout=60)[0]
    assert "is already there" in second.communicate(timeout=60)[0]
    assert (first.returncode, second.returncode) == (0, 0)
    assert fetch(vendor).commit == upstream.one


def test_dry_run_changes_nothing(
    server: Server, vendor: Path, upstream: Upstream, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch(vendor, dry_run=True).commit == upstream.one
    assert not vendor.exists()
    assert server.requests == 0
    record = fetch(vendor)
    capsys.readouterr()
    assert fetch(vendor, latest=True, dry_run=True).commit == upstream.two
    said = capsys.readouterr().out
    assert upstream.one[:7] in said
    assert upstream.two[:7] in said
    assert_untouched(vendor, record)


def test_a_password_in_the_url_is_written_nowhere(
    server: Server, vendor: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = server.url.replace("//", "//me:secret@")
    record = fetch(vendor, url=f"{url}/agents")
    assert record.url == f"{server.url}/agents"
    with pytest.raises(errors.NoSuchRepository) as caught:
        fetch(vendor, url=f"{url}/nonesuch", ref="main")
    assert "secret" not in str(caught.value) + capsys.readouterr().out
    written = [path for path in (vendor / "OpenAgents").rglob("*") if path.is_file()]
    assert not [path for path in written if b"secret" in path.read_bytes()]


def test_the_ca_of_the_settings_is_trusted(
    upstream: Upstream, vendor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GIT_SSL_CAINFO", raising=False)
    key, ca = tmp_path / "key.pem", tmp_path / "ca.pem"
    made = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    names = [
        "-subj",
        "/CN=loopback",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        str(key),
        "-out",
        str(ca),
    ]
    subprocess.run([*made, *names], check=True, capture_output=True)
    both = tmp_path / "both.pem"
    both.write_bytes(key.read_bytes() + ca.read_bytes())
    with serve(upstream.root, both) as server:
        options: dict[str, Any] = {
            "url": f"{server.url}/agents",
            "ref": upstream.one,
            "vendor": vendor,
        }
        with pytest.raises(errors.GitHostUnreachable, match="--ca"):
            openagents.fetch(Settings.model_validate(SETTINGS), starter=False, **options)
        trusting = Settings.model_validate(SETTINGS | {"ca": str(ca)})
        assert openagents.fetch(trusting, **options).commit == upstream.one


@pytest.mark.usefixtures("server")
def test_a_terminal_shows_progress(vendor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(console, "console", lambda: terminal)
    fetch(vendor)
    assert "objects: 100%" in screen.getvalue()


@pytest.mark.usefixtures("server")
def test_a_broken_pin_is_named(
    vendor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.json").write_text('{"url": ""}')
    monkeypatch.setattr(openagents, "PIN", tmp_path / "broken.json")
    with pytest.raises(errors.LockBroken):
        fetch(vendor)


@pytest.mark.parametrize("options", [{}, {"dry_run": True, "latest": True}])
@pytest.mark.usefixtures("server")
def test_a_missing_git_is_named(
    vendor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    child = start(vendor, **options)
    _, said = child.communicate(timeout=60)
    assert child.returncode == errors.ToolMissing.exit_code, said
    assert "./inv setup" in said
