"""Building: what a build's output tells, what is refused before it, and how images are named and
labelled.
"""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import process, state
from pipeline.core.clock import now
from pipeline.core.errors import (
    BuildFailed,
    ConfigRefused,
    ContainerfileRefused,
    DiskFull,
    EngineLost,
    LockBroken,
    NothingFetched,
    NotWritable,
    PipelineError,
    SettingRefused,
    ToolMissing,
    named,
)
from pipeline.core.settings import ROOT, Settings
from pipeline.core.state import read_jsonc
from pipeline.engines.engine import Engine
from pipeline.image import build, labels
from pipeline.image.build import base_of, check_config, explain
from pipeline.image.context import changes, hash_inputs
from pipeline.inputs import base, ca, openagents

ENGINE = Engine("docker", "/d", "20.10", buildkit=True)
UNKNOWN = "parse error line 3: unknown instruction: RUNN"


@pytest.mark.parametrize(
    ("said", "alive", "failure"),
    [
        (
            'Error: building at STEP "RUN false": while running runtime: exit status 1',
            True,
            BuildFailed,
        ),
        ("writing blob: write /var/tmp/x: no space left on device", True, DiskFull),
        ("npm ERR! code ENOSPC", False, DiskFull),
        # What podman 4.3, docker's old builder, BuildKit in docker 20.10 and buildx say of a word
        # they do not know.
        (
            'Error: building at STEP "RUNN ": Build error: Unknown instruction: "RUNN" &x{}',
            True,
            ContainerfileRefused,
        ),
        (f"Error response from daemon: dockerfile {UNKNOWN}", True, ContainerfileRefused),
        (
            f"failed to solve with frontend dockerfile.v0: dockerfile {UNKNOWN}",
            True,
            ContainerfileRefused,
        ),
        (
            f"ERROR: failed to solve: dockerfile {UNKNOWN}\n\nView build details: x",
            True,
            ContainerfileRefused,
        ),
        ("Error: no FROM statement found", True, ContainerfileRefused),
        # A step may say the same of a file of its own.
        (
            "app.rc: parse error on line 3\nThe command '/bin/sh -c true' returned a non-zero code: 1",
            True,
            BuildFailed,
        ),
        (
            "ERROR: unknown instruction\n" + "more\n" * 10 + "Error: building: exit status 1",
            True,
            BuildFailed,
        ),
        # A daemon that systemd starts again answers by the time it is asked.
        ("Step 2/9 : RUN make\nunexpected EOF", True, EngineLost),
        (
            "ERROR: failed to receive status: error reading from server: unexpected EOF",
            True,
            EngineLost,
        ),
        (
            "failed to receive status: rpc error: code = Unavailable desc = transport is closing",
            True,
            EngineLost,
        ),
        ("error during connect: Post http://docker/build: EOF", True, EngineLost),
        (
            "ERROR: Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?",
            True,
            EngineLost,
        ),
        (
            "Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?",
            True,
            EngineLost,
        ),
        (
            "tar: unexpected EOF\nThe command '/bin/sh -c tar x' returned a non-zero code: 2",
            True,
            BuildFailed,
        ),
        ("Cannot connect to the Docker daemon at unix:///var/run/docker.sock", False, EngineLost),
        ("npm ERR! code EINTEGRITY\nnpm ERR! sha512-a integrity checksum failed", True, LockBroken),
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.",
            True,
            LockBroken,
        ),
    ],
)
def test_a_failed_build_is_explained_by_what_it_said(
    monkeypatch: pytest.MonkeyPatch, said: str, *, alive: bool, failure: type[PipelineError]
) -> None:
    monkeypatch.setattr(Engine, "answers", lambda _: alive)
    before = "\n".join(f"line {number}" for number in range(100))
    explained = explain(process.Completed(("docker",), 1, f"{before}\n{said}", "", 1.0), ENGINE)
    assert type(explained) is failure
    assert explained.details.endswith(said)
    assert "line 99" in explained.details
    assert "line 50" not in explained.details


def test_an_engine_that_a_signal_ended_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "answers", lambda _: True)
    killed = process.Completed(("podman",), -9, "STEP 2/9: RUN make", "", 1.0)
    assert type(explain(killed, ENGINE)) is EngineLost


def test_the_configuration_of_this_repository_is_one_of_opencode() -> None:
    check_config(ROOT / "config.json")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{'a': 1}", "Expecting property name"),
        ("", "Expecting value"),
        ("[]", "top level: [] is not of type 'object'"),
        ('{"autoupdat": true}', "'autoupdat' was unexpected"),
        ('{"share": "sometimes"}', "share: 'sometimes'"),
        ('{"provider": {"x": {"options": 3}}}', "provider.x.options: 3 is not of type 'object'"),
    ],
)
def test_a_configuration_opencode_would_not_take_is_refused(
    tmp_path: Path, text: str, named: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigRefused) as caught:
        check_config(path)
    assert named in caught.value.what + caught.value.details
    assert "config.json" in caught.value.what


def test_a_missing_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigRefused, match="No such file"):
        check_config(tmp_path / "config.json")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The parts of this repository that go into an image."""
    for name in ("Containerfile", "config.json", ".dockerignore"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "locks", tmp_path / "locks")
    (tmp_path / "scripts" / "__pycache__").mkdir(parents=True)
    (tmp_path / "scripts" / "__pycache__" / "status.pyc").write_bytes(b"\0")
    (tmp_path / "scripts" / "status").write_text("#!/bin/sh\n")
    return tmp_path


def test_what_changed_since_the_last_build(tree: Path) -> None:
    before = hash_inputs(tree, "tree-1")
    assert {
        "Containerfile",
        "config.json",
        "scripts/status",
        "locks/base.json",
        "vendor/OpenAgents",
    } <= before.keys()
    assert not [path for path in before if "__pycache__" in path]
    assert changes({}, before) == changes({"inputs": {}}, before) == ["the first build here"]
    assert changes({"inputs": before}, before) == ["nothing changed"]
    assert changes({"inputs": before}, hash_inputs(tree, "tree-1", "gcc")) == [
        "the setting packages is new"
    ]
    (tree / "config.json").write_text("{}")
    (tree / "scripts" / "status").rename(tree / "scripts" / "state")
    assert changes({"inputs": before}, hash_inputs(tree, "tree-2")) == [
        "config.json changed",
        "scripts/state is new",
        "vendor/OpenAgents changed",
        "scripts/status was removed",
    ]


def test_every_input_that_the_engine_sees_is_one_that_changes(tree: Path) -> None:
    rules = (tree / ".dockerignore").read_text()
    (tree / ".dockerignore").write_text(f"{rules}!extra\n")
    (tree / "extra").mkdir()
    tool = tree / "extra" / "tool.sh"
    tool.write_text("#!/bin/sh\n")
    (tree / "extra" / ".env").write_text("excluded by an earlier line, included by the last")
    before = hash_inputs(tree, "")
    assert {"extra/tool.sh", "extra/.env", "config.json"} <= before.keys()
    edits: dict[str, Callable[[], object]] = {
        "extra/tool.sh": lambda: tool.chmod(0o700),
        ".dockerignore": lambda: (tree / ".dockerignore").write_text(f"# new\n{rules}!extra\n"),
        "locks/base.json": lambda: (tree / "locks/base.json").write_text("{}"),
        "extra/link": lambda: (tree / "extra/link").symlink_to("nowhere"),
    }
    for name, edit in edits.items():
        edit()
        after = hash_inputs(tree, "")
        assert [said.split()[0] for said in changes({"inputs": before}, after)] == [name]
        before = after


def test_a_script_with_the_line_ends_of_windows_is_named(tree: Path) -> None:
    (tree / "scripts/status").write_bytes(b"#!/bin/sh\r\ntrue\r\n")
    with pytest.raises(ContainerfileRefused, match="scripts/status has the line ends of Windows"):
        hash_inputs(tree, "")


def test_a_checkout_on_windows_has_scripts_that_run_and_no_links(tmp_path: Path) -> None:
    settings = ["-c", "core.autocrlf=true", "-c", "core.symlinks=false"]
    clone = ["git", *settings, "clone", "-q", "--depth=1", ROOT.as_uri(), str(tmp_path / "c")]
    assert process.run(clone).ok
    assert "scripts/status" in hash_inputs(tmp_path / "c", "")  # refuses scripts with CRLF
    assert b"\r" not in (tmp_path / "c" / "inv").read_bytes()
    listed = process.run(["git", "-C", str(tmp_path / "c"), "ls-files", "-s"]).stdout
    assert "Containerfile" in listed
    assert not re.search("^120000", listed, re.MULTILINE)


@pytest.mark.parametrize(
    ("containerfile", "base"),
    [
        ("ARG BASE=node:20-slim\nFROM ${BASE}\n", ""),
        ("ARG BASE=node:20-slim\nFROM alpine AS tools\nFROM $BASE AS x\n", ""),
        ("ARG BASE\nFROM ${BASE}", ""),
        ("FROM node:20-slim", ""),
        ("from --platform=linux/amd64 node:20-slim as x\nFROM x AS y", ""),
        ("ARG BASE=node:22-slim\nFROM ${BASE}\n", "node:22-slim"),
        ("ARG BASE=node:20-slim\nFROM alpine\nFROM debian:12", "debian:12"),
        ("FRUM x", ""),
    ],
)
def test_the_base_is_the_one_that_the_containerfile_names(containerfile: str, base: str) -> None:
    assert base_of(containerfile) == base


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("\ufeff{}", {}),
        (
            '{"a": "// no /* comment */ ,}", // one\n /* two\n */ "b": [1, 2,],}',
            {"a": "// no /* comment */ ,}", "b": [1, 2]},
        ),
        ('{"a": "\\"//",\r\n}', {"a": '"//'}),
        ('{"a": 1, // last\n}', {"a": 1}),
    ],
)
def test_a_configuration_may_be_what_opencode_reads(
    tmp_path: Path, text: str, value: object
) -> None:
    (tmp_path / "config.json").write_text(text, newline="")
    assert read_jsonc(tmp_path / "config.json") == value


def test_a_fault_in_a_configuration_has_its_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{ /* one\n two */\n //\n 'a': 1}")
    with pytest.raises(ValueError, match="line 4 column 2"):
        read_jsonc(tmp_path / "config.json")


FETCHED = openagents.Record(
    kind="openagents",
    url="https://me:pw@git.example.com/oa",
    ref="main",
    commit="c" * 40,
    fetched="",
    tree="t",
)
PULLED = base.Base(
    "opencode-server-base:pulled-1", "i" * 64, "node:20-slim", "sha256:d", made=False
)


def test_labels_with_what_differs_each_time_last(monkeypatch: pytest.MonkeyPatch) -> None:
    git = {
        "rev-parse": "a" * 40,
        "config": "https://x:y@git.example.com/us",
        "status": " M README.md",
    }
    monkeypatch.setattr(labels, "_git", lambda *words: git[words[0]])
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    got = labels.labels("opencode-server-nightly", PULLED, FETCHED, edited=False)
    assert got == {
        "opencode-server.build": "opencode-server",
        "org.opencontainers.image.title": "opencode-server",
        "org.opencontainers.image.source": "https://git.example.com/us",
        "org.opencontainers.image.base.name": "node:20-slim",
        "org.opencontainers.image.base.digest": "sha256:d",
        "opencode-server.openagents.kind": "openagents",
        "opencode-server.openagents.source": "https://git.example.com/oa",
        "opencode-server.openagents.commit": "c" * 40,
        "org.opencontainers.image.revision": "a" * 40 + "-dirty",
        "org.opencontainers.image.created": "1970-01-02T00:00:00Z",
    }
    assert list(got)[-2:] == [
        "org.opencontainers.image.revision",
        "org.opencontainers.image.created",
    ]
    git["status"] = ""
    clean = labels.labels("ours", PULLED, FETCHED, edited=True)
    assert clean["org.opencontainers.image.revision"] == "a" * 40
    assert clean["opencode-server.openagents.commit"] == "c" * 40 + "-edited"
    monkeypatch.setattr(labels, "_git", lambda *_: "")
    made = base.Base("b", "i", "node:20-slim", "", made=True)
    elsewhere = labels.labels("ours", made, FETCHED, edited=False)
    assert elsewhere["org.opencontainers.image.base.digest"] == "sha256:i"
    assert all(elsewhere.values())


def test_a_record_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "build" / "record.json"
    state.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        state.write_json(path, {"a": object()})
    assert state.read_json(path) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("torn", [None, b"", b'{"inputs": {"a"', b"null", b"[]", b"\xff"])
def test_a_torn_record_is_as_good_as_none(tmp_path: Path, torn: bytes | None) -> None:
    path = tmp_path / "record.json"
    if torn is not None:
        path.write_bytes(torn)
    assert state.read_json(path) == {}


@pytest.mark.parametrize("epoch", ["abc", "-1", "1.5", "0x10"])
def test_a_time_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, epoch: str) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    with pytest.raises(SettingRefused, match=f"SOURCE_DATE_EPOCH={epoch}: not a number of seconds"):
        now()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "")
    assert now() > "2026"


def test_an_unpacked_archive_has_no_revision_whatever_is_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    for words in (
        ["init", "--quiet"],
        ["commit", "--quiet", "--allow-empty", "--message", "somebody else's"],
    ):
        assert process.run([*git, *words]).ok
    monkeypatch.setattr(labels, "ROOT", tmp_path)
    assert len(labels._git("rev-parse", "HEAD")) == 40
    monkeypatch.setattr(labels, "ROOT", tmp_path / "archive")
    (tmp_path / "archive").mkdir()
    assert labels._git("rev-parse", "HEAD") == ""


class Builder:
    """Stands for process.run: an engine that has the base, and builds what it is told to."""

    def __init__(self, *, fails: bool = False, keeps: bool = True) -> None:
        self.here: set[str] = set()
        self.builds: list[list[str]] = []
        self.texts: list[str] = []
        self.fails, self.keeps = fails, keeps

    def __call__(self, argv: list[str], **options: Any) -> process.Completed:
        code, out = 0, ""
        if argv[1] == "build":
            self.builds.append(argv)
            self.texts.append(Path(argv[argv.index("--file") + 1]).read_text())
            options["on_line"]("Step 1/1 : FROM base")
            if self.fails:
                code, out = 1, "exit status 1"
            elif self.keeps:
                self.here.add(argv[argv.index("--tag") + 1])
        elif argv[1:3] == ["image", "inspect"]:
            told = {
                "Id": "sha256:" + "e" * 64,
                "Size": 750_000_000,
                "Config": {},
                "RootFS": {"Layers": ["a"]},
            }
            answer = json.dumps([told])
            code, out = (0, answer) if argv[3] in self.here else (1, "")
        return process.Completed(tuple(argv), code, out, "", 0.0)


@pytest.fixture
def ready(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Builder]:
    """A repository in which everything is fetched; OpenAgents is what the record says."""
    monkeypatch.setattr(build, "ROOT", tree)
    monkeypatch.setattr(build, "BUILD", tree / "build")
    monkeypatch.setattr(labels, "ROOT", tree)
    monkeypatch.setattr(openagents, "read", lambda _: FETCHED)
    monkeypatch.setattr(base, "ensure", lambda *_, **__: PULLED)
    monkeypatch.setattr(ca, "stage", lambda _: 0)
    monkeypatch.setattr(Engine, "answers", lambda _: True)

    def use(*, fails: bool = False, keeps: bool = True) -> Builder:
        builder = Builder(fails=fails, keeps=keeps)
        monkeypatch.setattr(process, "run", builder)
        return builder

    return use


def test_a_label_is_quoted_for_the_containerfile() -> None:
    line = labels.instruction({"a": "two words", "b": 'a "$HOME" \\ é'})
    assert line == 'LABEL a="two words" b="a \\"\\$HOME\\" \\\\ é"\n'


def test_the_containerfile_is_built_as_it_is_with_labels(
    ready: Callable[..., Builder], tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    builder = ready()
    record = build.build(Settings(), ENGINE)
    [argv] = builder.builds
    [text] = builder.texts
    assert argv[argv.index("--build-arg") + 1] == "BASE=opencode-server-base:pulled-1"
    assert argv[argv.index("--tag") + 1] == "opencode-server:candidate"
    assert argv[-1] == str(tree)
    original, label = text.split("\nLABEL ")
    assert original == (tree / "Containerfile").read_text()
    assert label.startswith('opencode-server.build="opencode-server" org.opencontainers.image.')
    assert label.count("\n") == 1
    assert record == json.loads((tree / "build" / "build-docker.json").read_text())
    assert (record["id"], record["size"], record["changes"]) == (
        "e" * 64,
        750_000_000,
        ["the first build here"],
    )

    (tree / "config.json").write_text("{}")
    assert build.build(Settings(), ENGINE)["changes"] == ["config.json changed"]
    assert "750.0 MB (+0.0 MB)" in capsys.readouterr().out
    build.build(Settings(), ENGINE, cache=False)
    assert ["--no-cache" in argv for argv in builder.builds] == [False, False, True]
    capsys.readouterr()
    (tree / "build" / "build-docker.json").write_text('{"image": "opencode-ser')
    assert build.build(Settings(), ENGINE)["changes"] == ["the first build here"]
    assert "750.0 MB  in" in capsys.readouterr().out


def test_a_base_that_the_containerfile_names_is_used_and_is_in_the_label(
    ready: Callable[..., Builder], tree: Path
) -> None:
    builder = ready()
    (tree / "Containerfile").write_text("ARG BASE=node:22-slim\nFROM ${BASE}\n")
    build.build(Settings(), ENGINE)
    [argv] = builder.builds
    assert "--build-arg" not in argv
    assert 'image.base.name="node:22-slim"' in builder.texts[0]


def test_an_image_that_a_builder_elsewhere_keeps_is_not_taken_for_built(
    ready: Callable[..., Builder], tree: Path
) -> None:
    ready(keeps=False)
    with pytest.raises(
        EngineLost, match="docker built opencode-server:candidate, but does not have it"
    ):
        build.build(Settings(), ENGINE)
    assert not list((tree / "build").iterdir())


def test_a_docker_without_buildkit_is_refused(ready: Callable[..., Builder]) -> None:
    builder = ready()
    with pytest.raises(ToolMissing, match="BuildKit") as caught:
        build.build(Settings(), Engine("docker", "/d", "28"))
    assert "docker-buildx" in caught.value.remedy
    assert builder.builds == []


def test_nothing_is_built_of_what_is_refused_missing_or_only_asked_about(
    ready: Callable[..., Builder], tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = ready()
    assert build.build(Settings(), ENGINE, dry_run=True) == {}
    (tree / "config.json").write_text("{")
    with pytest.raises(ConfigRefused):
        build.build(Settings(), ENGINE)
    (tree / "config.json").write_text("{}")
    monkeypatch.setattr(openagents, "read", lambda _: None)
    with pytest.raises(NothingFetched):
        build.build(Settings(), ENGINE)
    assert builder.builds == []


def test_a_read_only_checkout_is_named_before_a_tag_moves(
    ready: Callable[..., Builder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(dir: Path) -> None:  # noqa: A002 -- as tempfile names it
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    builder = ready()
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(NotWritable, match="build: Read-only file system"), named():
        build.build(Settings(), ENGINE)
    assert builder.builds == []


def test_a_failed_build_leaves_the_last_record(ready: Callable[..., Builder], tree: Path) -> None:
    ready()
    build.build(Settings(), ENGINE)
    record = (tree / "build" / "build-docker.json").read_text()
    ready(fails=True)
    with pytest.raises(BuildFailed):
        build.build(Settings(), ENGINE)
    assert (tree / "build" / "build-docker.json").read_text() == record
