"""Building: what a build's output tells, what is refused before it, and how images are named and labelled."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import base, ca, contents, image, openagents, process, records
from pipeline.engine import Engine
from pipeline.errors import (
    BuildFailed,
    ConfigRefused,
    ContainerfileRefused,
    DiskFull,
    EngineLost,
    LockBroken,
    NothingFetched,
    PipelineError,
    SettingRefused,
)
from pipeline.image import Steps, changes, check_config, explain, runtime_tag
from pipeline.settings import ROOT, Settings

# What `podman build --jobs 4` of 4.3.1 said of three stages, with the seconds at which it said it.
PODMAN = """
0.00 [3/3] STEP 1/3: FROM localhost/base AS three
0.00 [1/3] STEP 1/3: FROM localhost/base AS one
0.01 [2/3] STEP 1/2: FROM localhost/base AS two
0.03 [1/3] STEP 2/3: RUN echo one
0.03 [3/3] STEP 2/3: COPY --from=one /etc/hostname /a
0.04 [2/3] STEP 2/2: RUN sleep 1
0.36 one
0.50 --> 9089d634d4d
0.51 [1/3] STEP 3/3: RUN echo again; sleep 0.4
0.77 again
1.31 --> 3c2424ac61c
1.56 --> f5b07fd91bf
1.61 [3/3] STEP 3/3: COPY --from=two /etc/hostname /b
1.64 --> 24339cacd55
1.81 [3/3] COMMIT opencode-server:candidate
1.86 --> c5c12c1b41e
1.87 Successfully tagged localhost/opencode-server:candidate
1.90 c5c12c1b41ee5955965e6854601ec86754717ebc2f842ef17a6fd9cee13b23fe
"""

PODMAN_CACHED = """
0.0 STEP 1/3: FROM localhost/base AS server
0.1 STEP 2/3: COPY scripts/ /app/scripts/
0.2 --> Using cache 24339cacd553bd78a2a59ef32841a053228b98235287c5ce229649a777a1433d
0.2 --> 24339cacd55
0.3 STEP 3/3: COPY config.json /root/
0.9 COMMIT opencode-server:candidate
1.0 --> a7bdbfdd1ca
"""

BUILDKIT = """
0 #4 [npm 1/5] FROM opencode-server-base:made-a898643bf086
0 #4 sha256:427962e65c7b1737530a86dad4e4a5368169a392521c05765be8b1d0864afd99
0 #4 DONE 0.0s
0 #9 [npm 4/5] RUN set -eu;     npm ci
0 #9 ...
0 #5 [system 2/2] RUN set -eu;     apt-get update
0 #5 0.348 Get:1 InRelease [34.8 kB]
0 #9 [npm 4/5] RUN set -eu;     npm ci
0 #9 7.358
0 #9 DONE 10.5s
0 #5 [system 2/2] RUN set -eu;     apt-get update
0 #5 DONE 19.7s
0 #7 [npm 2/5] COPY vendor/ca/ /tmp/ca/
0 #7 CACHED
0 #10 exporting to image
0 #10 DONE 0.1s
"""

LEGACY = """
0.0 Step 1/5 : FROM base AS one
0.1  ---> 7d4923f2ec1e
0.1 Step 2/5 : RUN sleep 2
0.2  ---> Running in 4da13ddafb34
2.3 Removing intermediate container 4da13ddafb34
2.4  ---> a96ef91dbb6a
2.5 Step 3/5 : COPY a /a
2.5  ---> Using cache
2.5  ---> d2b70e947cad
2.6 Step 4/5 : FROM base
2.6  ---> 7d4923f2ec1e
2.7 Step 5/5 : RUN sleep 3
2.8  ---> Running in 86ee887d6f78
5.9 Removing intermediate container 86ee887d6f78
6.0  ---> d2b70e947caf
6.1 Successfully built d2b70e947caf
"""


def steps(recorded: str, *, end: float) -> dict[str, float]:
    taken = Steps()
    for line in recorded.strip("\n").splitlines():
        when, _, text = line.partition(" ")
        taken.feed(text, float(when))
    took = taken.finish(end)
    assert took == sorted(took, key=lambda step: -step[1])
    assert len(dict(took)) == len(took)
    return {text: round(seconds, 2) for text, seconds in took}


def test_steps_of_podmans_parallel_stages() -> None:
    took = steps(PODMAN, end=9.0)
    assert took.pop("COPY --from=two /etc/hostname /b") == 0.25
    assert took.pop("COPY --from=one /etc/hostname /a") == 1.58
    assert took.pop("RUN echo one") == 0.48
    # Nothing in the output says which of the stages that ended side by side a mark belongs to: the first begun has it.
    assert took.pop("RUN sleep 1") == 1.27
    assert took.pop("RUN echo again; sleep 0.4") == 1.13
    assert sorted(took) == [f"FROM localhost/base AS {stage}" for stage in ("one", "three", "two")]


def test_steps_that_come_out_of_the_cache() -> None:
    took = steps(PODMAN_CACHED, end=9.0)
    assert took["COPY config.json /root/"] == 0.7
    assert took["COPY scripts/ /app/scripts/"] == 0.2


def test_steps_of_buildkit_are_its_own_times() -> None:
    assert steps(BUILDKIT, end=99.0) == {
        "[system 2/2] RUN set -eu;     apt-get update": 19.7,
        "[npm 4/5] RUN set -eu;     npm ci": 10.5,
        "[npm 1/5] FROM opencode-server-base:made-a898643bf086": 0.0,
    }


def test_steps_of_dockers_legacy_builder() -> None:
    took = steps(LEGACY, end=9.0)
    assert (took["RUN sleep 3"], took["RUN sleep 2"], took["COPY a /a"]) == (3.3, 2.4, 0.1)


ENGINE = Engine("docker", "/d", "20.10")
UNKNOWN = "parse error line 3: unknown instruction: RUNN"


@pytest.mark.parametrize(
    ("said", "alive", "failure"),
    [
        ('Error: building at STEP "RUN false": while running runtime: exit status 1', True, BuildFailed),
        ("writing blob: write /var/tmp/x: no space left on device", True, DiskFull),
        ("npm ERR! code ENOSPC", False, DiskFull),
        # What podman 4.3, docker's old builder, BuildKit in docker 20.10 and buildx say of a word they do not know.
        ('Error: building at STEP "RUNN ": Build error: Unknown instruction: "RUNN" &x{}', True, ContainerfileRefused),
        (f"Error response from daemon: dockerfile {UNKNOWN}", True, ContainerfileRefused),
        (f"failed to solve with frontend dockerfile.v0: dockerfile {UNKNOWN}", True, ContainerfileRefused),
        (f"ERROR: failed to solve: dockerfile {UNKNOWN}\n\nView build details: x", True, ContainerfileRefused),
        ("Error: no FROM statement found", True, ContainerfileRefused),
        # A step may say the same of a file of its own.
        ("app.rc: parse error on line 3\nThe command '/bin/sh -c true' returned a non-zero code: 1", True, BuildFailed),
        ("ERROR: unknown instruction\n" + "more\n" * 10 + "Error: building: exit status 1", True, BuildFailed),
        # A daemon that systemd starts again answers by the time it is asked.
        ("Step 2/9 : RUN make\nunexpected EOF", True, EngineLost),
        ("ERROR: failed to receive status: error reading from server: unexpected EOF", True, EngineLost),
        ("failed to receive status: rpc error: code = Unavailable desc = transport is closing", True, EngineLost),
        ("error during connect: Post http://docker/build: EOF", True, EngineLost),
        ("ERROR: Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?", True, EngineLost),
        ("Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?", True, EngineLost),
        ("tar: unexpected EOF\nThe command '/bin/sh -c tar x' returned a non-zero code: 2", True, BuildFailed),
        ("Cannot connect to the Docker daemon at unix:///var/run/docker.sock", False, EngineLost),
        ("npm ERR! code EINTEGRITY\nnpm ERR! sha512-a integrity checksum failed", True, LockBroken),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", True, LockBroken),
    ],
)
def test_a_failed_build_is_explained_by_what_it_said(
    monkeypatch: pytest.MonkeyPatch, said: str, *, alive: bool, failure: type[PipelineError]
) -> None:
    monkeypatch.setattr(image, "look", lambda _: (ENGINE if alive else None, []))
    before = "\n".join(f"line {number}" for number in range(100))
    explained = explain(process.Completed(("docker",), 1, f"{before}\n{said}", "", 1.0), ENGINE)
    assert type(explained) is failure
    assert explained.details.endswith(said)
    assert "line 99" in explained.details
    assert "line 50" not in explained.details


def test_an_engine_that_a_signal_ended_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "look", lambda _: (ENGINE, []))
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
def test_a_configuration_opencode_would_not_take_is_refused(tmp_path: Path, text: str, named: str) -> None:
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
    for name in ("Containerfile", "config.json"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "locks", tmp_path / "locks")
    (tmp_path / "scripts" / "__pycache__").mkdir(parents=True)
    (tmp_path / "scripts" / "__pycache__" / "status.pyc").write_bytes(b"\0")
    (tmp_path / "scripts" / "status").write_text("#!/bin/sh\n")
    return tmp_path


def test_the_runtime_is_built_anew_for_what_goes_into_it_and_for_nothing_else(tree: Path) -> None:
    file = tree / "Containerfile"
    text = file.read_text()
    assert text.count(image.SPLIT) == 1
    first = runtime_tag(tree, "base:1")
    assert first.startswith("opencode-server-runtime:")

    for name in ("config.json", "scripts/status", "locks/openagents.json", "locks/dev.txt"):
        (tree / name).write_text("edited")
    file.write_text(text + "COPY more /more\n")
    assert runtime_tag(tree, "base:1") == first

    seen = {first, runtime_tag(tree, "base:2")}
    for name in ("npm/x64/package.json", "npm/arm64/package-lock.json", "image.txt", "uv.txt"):
        with (tree / "locks" / name).open("a") as lock:
            lock.write("\n")
        seen.add(runtime_tag(tree, "base:1"))
    file.write_text(text.replace("redis-tools", "redis-tools zip", 1))
    seen.add(runtime_tag(tree, "base:1"))
    assert len(seen) == 7


def test_what_changed_since_the_last_build(tree: Path) -> None:
    before = image.inputs_of(tree, "tree-1")
    assert {"Containerfile", "config.json", "scripts/status", "locks/base.json", "vendor/OpenAgents"} <= before.keys()
    assert not [path for path in before if "__pycache__" in path]
    assert changes({}, before) == changes({"inputs": {}}, before) == ["the first build here"]
    assert changes({"inputs": before}, before) == ["nothing changed"]
    (tree / "config.json").write_text("{}")
    (tree / "scripts" / "status").rename(tree / "scripts" / "state")
    assert changes({"inputs": before}, image.inputs_of(tree, "tree-2")) == [
        "config.json changed",
        "vendor/OpenAgents changed",
        "scripts/state is new",
        "scripts/status is gone",
    ]


FETCHED = openagents.Record(
    kind="openagents", url="https://me:pw@git.example.com/oa", ref="main", commit="c" * 40, fetched="", tree="t"
)
PULLED = base.Base("opencode-server-base:pulled-1", "i" * 64, "node:20-slim", "sha256:d", made=False)


def test_labels_with_what_differs_each_time_last(monkeypatch: pytest.MonkeyPatch) -> None:
    git = {"rev-parse": "a" * 40, "config": "https://x:y@git.example.com/us", "status": " M README.md"}
    monkeypatch.setattr(image, "_git", lambda *words: git[words[0]])
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    got = image.labels(PULLED, FETCHED, edited=False)
    assert got == {
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
    assert list(got)[-2:] == ["org.opencontainers.image.revision", "org.opencontainers.image.created"]
    git["status"] = ""
    clean = image.labels(PULLED, FETCHED, edited=True)
    assert clean["org.opencontainers.image.revision"] == "a" * 40
    assert clean["opencode-server.openagents.commit"] == "c" * 40 + "-edited"
    monkeypatch.setattr(image, "_git", lambda *_: "")
    elsewhere = image.labels(base.Base("b", "i", "node:20-slim", "", made=True), FETCHED, edited=False)
    assert elsewhere["org.opencontainers.image.base.digest"] == "sha256:i"
    assert all(elsewhere.values())


def test_a_record_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "build" / "record.json"
    records.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        records.write_json(path, {"a": object()})
    assert records.read_json(path) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("torn", [None, b"", b'{"inputs": {"a"', b"null", b"[]", b"\xff"])
def test_a_torn_record_is_as_good_as_none(tmp_path: Path, torn: bytes | None) -> None:
    path = tmp_path / "record.json"
    if torn is not None:
        path.write_bytes(torn)
    assert records.read_json(path) == {}


@pytest.mark.parametrize("epoch", ["abc", "-1", "1.5", "0x10"])
def test_a_time_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, epoch: str) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    with pytest.raises(SettingRefused, match=f"SOURCE_DATE_EPOCH={epoch} is no number of seconds"):
        image.now()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "")
    assert image.now() > "2026"


def test_an_unpacked_archive_has_no_revision_whatever_is_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    for words in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message", "somebody else's"]):
        assert process.run([*git, *words]).ok
    monkeypatch.setattr(image, "ROOT", tmp_path)
    assert len(image._git("rev-parse", "HEAD")) == 40
    monkeypatch.setattr(image, "ROOT", tmp_path / "archive")
    (tmp_path / "archive").mkdir()
    assert image._git("rev-parse", "HEAD") == ""


@pytest.mark.parametrize("text", [None, "FROM runtime AS servers\n", "FROM node\n# FROM runtime AS server\n", ""])
def test_a_containerfile_without_its_last_stage_is_refused_in_words(tree: Path, text: str | None) -> None:
    file = tree / "Containerfile"
    assert image.read_containerfile(tree) == file.read_text()
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    for ask in (image.read_containerfile, lambda root: runtime_tag(root, "base:1")):
        with pytest.raises(ContainerfileRefused, match="the Containerfile has no line 'FROM runtime AS server'"):
            ask(tree)


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
            told = {"Id": "sha256:" + "e" * 64, "Size": 750_000_000, "Config": {}, "RootFS": {"Layers": ["a"]}}
            answer = json.dumps([told])
            code, out = (0, answer) if argv[3] in self.here else (1, "")
        elif argv[1] == "run":
            out = '{"system": "", "debian": "", "node": "", "packages": {"npm": {"zod": ["4", 5]}}}'
        return process.Completed(tuple(argv), code, out, "", 0.0)


@pytest.fixture
def ready(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Builder]:
    """A repository in which everything is fetched; OpenAgents is what the record says."""
    monkeypatch.setattr(image, "ROOT", tree)
    monkeypatch.setattr(image, "BUILD", tree / "build")
    monkeypatch.setattr(contents, "BUILD", tree / "build")
    monkeypatch.setattr(openagents, "read", lambda _: FETCHED)
    monkeypatch.setattr(base, "ensure", lambda *_, **__: PULLED)
    monkeypatch.setattr(ca, "stage", lambda _: 0)
    monkeypatch.setattr(image, "look", lambda _: (ENGINE, []))

    def use(*, fails: bool = False, keeps: bool = True) -> Builder:
        builder = Builder(fails=fails, keeps=keeps)
        monkeypatch.setattr(process, "run", builder)
        return builder

    return use


def test_a_label_is_quoted_for_the_containerfile() -> None:
    line = image.label_line({"a": "two words", "b": 'a "$HOME" \\ é'})
    assert line == '\nLABEL a="two words" b="a \\"\\$HOME\\" \\\\ é"\n'
    assert image.label_line({}) == ""


def test_the_runtime_is_built_once_and_the_rest_on_top_of_it(
    ready: Callable[..., Builder], tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    builder = ready()
    record = image.build(Settings(), ENGINE)
    runtime, server = builder.builds
    assert runtime[runtime.index("--target") + 1] == "runtime"
    tag = runtime[runtime.index("--tag") + 1]
    assert "BASE=opencode-server-base:pulled-1" in runtime
    assert f"\nFROM {tag} AS server\n" in builder.texts[1]
    assert builder.texts[1].count("FROM") == 1
    lines = [text.splitlines() for text in ((tree / "Containerfile").read_text(), *builder.texts)]
    begins = lines[0].index("FROM runtime AS server")
    assert lines[1][:begins] == lines[0][:begins], "a line that an error names is where it says"
    assert lines[1][begins : begins + 3] == ['LABEL opencode-server.runtime="opencode-server"', "", lines[0][begins]]
    assert lines[2][begins + 1 : -2] == lines[0][begins + 1 :], "here too"
    assert lines[2][-1].startswith('LABEL opencode-server.build="opencode-server" org.opencontainers.image.title="')
    assert server[server.index("--tag") + 1] == "opencode-server:candidate"
    assert record == json.loads((tree / "build" / "build-docker.json").read_text())
    manifest = json.loads((tree / "build" / "contents-docker.json").read_text())
    assert (manifest["id"], manifest["packages"]) == ("e" * 64, {"npm": {"zod": ["4", 5]}})
    assert (record["id"], record["size"], record["changes"]) == ("e" * 64, 750_000_000, ["the first build here"])

    (tree / "config.json").write_text("{}")
    assert image.build(Settings(), ENGINE)["changes"] == ["config.json changed"]
    assert len(builder.builds) == 3
    assert "750.0 MB (+0.0 MB)" in capsys.readouterr().out
    image.build(Settings(), ENGINE, cache=False)
    assert ["--no-cache" in argv for argv in builder.builds] == [False, False, False, True, False]
    capsys.readouterr()
    (tree / "build" / "build-docker.json").write_text('{"image": "opencode-ser')
    assert image.build(Settings(), ENGINE)["changes"] == ["the first build here"]
    assert "750.0 MB  in" in capsys.readouterr().out


def test_an_image_that_a_builder_elsewhere_keeps_is_not_taken_for_built(
    ready: Callable[..., Builder], tree: Path
) -> None:
    ready(keeps=False)
    with pytest.raises(EngineLost, match="docker has built opencode-server:candidate and does not have it"):
        image.build(Settings(), ENGINE)
    assert not (tree / "build").exists()


def test_nothing_is_built_of_what_is_refused_missing_or_only_asked_about(
    ready: Callable[..., Builder], tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = ready()
    assert image.build(Settings(), ENGINE, dry_run=True) == {}
    (tree / "config.json").write_text("{")
    with pytest.raises(ConfigRefused):
        image.build(Settings(), ENGINE)
    (tree / "config.json").write_text("{}")
    monkeypatch.setattr(openagents, "read", lambda _: None)
    with pytest.raises(NothingFetched):
        image.build(Settings(), ENGINE)
    assert builder.builds == []


def test_a_failed_build_leaves_the_last_record(ready: Callable[..., Builder], tree: Path) -> None:
    ready()
    image.build(Settings(), ENGINE)
    record = (tree / "build" / "build-docker.json").read_text()
    ready(fails=True)
    with pytest.raises(BuildFailed):
        image.build(Settings(), ENGINE)
    assert (tree / "build" / "build-docker.json").read_text() == record
