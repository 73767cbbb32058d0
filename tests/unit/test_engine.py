"""podman and docker: exact command lines, and which of several programs on PATH is taken."""

import json
import os
import platform
import resource
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import engine as engines
from pipeline import process
from pipeline.engine import Engine, adapt, adaptations, describe, exit_program, find, look
from pipeline.errors import EngineBroken, NoEngine

PODMAN = Engine("podman", "/p", "4.3.1", flags=("--runtime", "runc"), limits=("--ulimit", "nproc=9:9"))
DOCKER = Engine("docker", "/d", "20.10.24", buildkit=True)

Place = Callable[..., Path]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Put a program on a PATH that holds nothing else; each call adds a directory behind the others."""
    monkeypatch.setattr(engines, "BUILD", tmp_path / "build")
    path: list[str] = []
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))

    def put(name: str, script: str) -> Path:
        directory = tmp_path / f"bin{len(path)}"
        directory.mkdir()
        program = directory / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        path.append(str(directory))
        monkeypatch.setenv("PATH", ":".join(path))
        return program

    return put


def podman(*, run: str = "exit 0", remote: bool = False) -> str:
    """A podman that answers, has the proof image, and does ``run`` for run."""
    info = {
        "host": {"serviceIsRemote": remote},
        "store": {"graphRoot": "/var/lib/containers/storage"},
        "version": {"Version": "4.3.1"},
    }
    return f"""
echo "$*" >> "$0.log"
case "$1" in --runtime) flags="$1 $2"; shift 2 ;; esac
case "$1" in
    info) echo '{json.dumps(info)}' ;;
    image) echo '[{{"Id": "sha256:abc"}}]' ;;
    run) {run} ;;
esac"""


def docker(version: str, *, daemon: bool = True, buildx: bool = False, root: str = "/nowhere") -> str:
    plugins = [{"Name": "buildx"}] if buildx else []
    info: dict[str, object] = {"ClientInfo": {"Plugins": plugins}}
    info |= (
        {"ServerVersion": "20.10.24", "DockerRootDir": root}
        if daemon
        else {"ServerErrors": ["Cannot connect to the Docker daemon at unix:///var/run/docker.sock."]}
    )
    return f"""
case "$1" in
    info) echo '{json.dumps(info)}'; exit {int(not daemon)} ;;
    version) echo {version} ;;
    image) echo '[{{}}]' ;;
esac"""


def test_build() -> None:
    said = {
        "context": Path("/src"),
        "tag": "opencode-server:candidate",
        "containerfile": Path("/src/Containerfile"),
        "target": "runtime",
        "build_args": {"BASE": "b", "RUNTIME": "r"},
        "cache": False,
    }
    middle = ["--no-cache", "--target", "runtime"]
    middle += ["--build-arg", "BASE=b", "--build-arg", "RUNTIME=r"]
    head = ["build", "--file", "/src/Containerfile", "--tag"]
    assert PODMAN.build(**said) == [  # type: ignore[arg-type]
        *("/p", "--runtime", "runc", *head, "localhost/opencode-server:candidate", *middle),
        *("--format", "docker", "--jobs", "4", "--ulimit", "nproc=9:9", "/src"),
    ]
    buildkit = ["/d", *head, "opencode-server:candidate", *middle, "--progress", "plain", "/src"]
    assert DOCKER.build(**said) == buildkit  # type: ignore[arg-type]
    short = {key: said[key] for key in ("context", "tag", "containerfile")}
    legacy = replace(DOCKER, buildkit=False)
    assert legacy.build(**short) == ["/d", *head, "opencode-server:candidate", "/src"]  # type: ignore[arg-type]
    # A builder of the user's own has none of the images that are here.
    assert PODMAN.env == {}
    assert DOCKER.env == {"DOCKER_BUILDKIT": "1", "BUILDX_BUILDER": ""}
    assert legacy.env == {"DOCKER_BUILDKIT": "0", "BUILDX_BUILDER": ""}


def test_another_platform() -> None:
    podman, docker = replace(PODMAN, flags=(), platform="linux/arm64"), replace(DOCKER, platform="linux/arm64")
    for engine in (podman, docker):
        assert engine.build(Path("/src"), tag="t", containerfile=Path("/c"))[-3:] == [
            "--platform",
            "linux/arm64",
            "/src",
        ]
    assert podman.pull("n@sha256:1") == ["/p", "pull", "--platform", "linux/arm64", "docker://n@sha256:1"]
    assert docker.pull("n@sha256:1") == ["/d", "pull", "--platform", "linux/arm64", "n@sha256:1"]
    # podman's import has no --platform, and docker's no --arch.
    assert podman.import_(Path("/b.tar"), "b:1")[2:6] == ["--os", "linux", "--arch", "arm64"]
    assert docker.import_(Path("/b.tar"), "b:1")[2:4] == ["--platform", "linux/arm64"]


def test_run_and_exec() -> None:
    options = ["--env", "SECRET", "--env", "A=1", "--publish", "127.0.0.1::4096", "--network", "none"]
    options += ["--label", "k=v"]
    whole = {
        "name": "n",
        "env": ["SECRET", "A=1"],
        "publish": "127.0.0.1::4096",
        "network": "none",
        "labels": {"k": "v"},
    }
    hardened = ["--read-only", "--tmpfs", "/tmp:exec", "--cap-drop", "all", "--security-opt", "no-new-privileges"]
    user, bounds = ["--user", "1000:1000"], ["--memory", "4g", "--pids-limit", "1024"]
    podman_run = ["/p", "--runtime", "runc", "run", "--name", "n", "--ulimit", "nproc=9:9", *hardened, *user, *bounds]
    volumes = ["--volume", "/state", "--volume", "v:/work"]
    run = PODMAN.run("i", "-c", "true", **whole, volumes=["/state", "v:/work"])  # type: ignore[arg-type]
    assert run == [*podman_run, "--detach", *options, *volumes, "i", "-c", "true"]
    assert DOCKER.run("i", name="n", keep=False) == ["/d", "run", "--name", "n", *hardened, *user, *bounds, "--rm", "i"]
    rootless = replace(DOCKER, rootless=True, bounded=False)
    assert rootless.run("i", name="n", keep=False) == ["/d", "run", "--name", "n", *hardened, "--rm", "i"]
    assert PODMAN.exec("n", "env", env=["A=1", "B"]) == [
        *("/p", "--runtime", "runc", "exec", "--env", "A=1", "--env", "B", "n", "env")
    ]


def test_the_commands_in_which_the_two_differ() -> None:
    plain = replace(PODMAN, flags=())
    changes = ["ENV A=1", 'CMD ["node"]']
    words = ["import", "--change", "ENV A=1", "--change", 'CMD ["node"]', "/base.tar"]
    assert plain.import_(Path("/base.tar"), "b:1", changes) == ["/p", *words, "localhost/b:1"]
    assert DOCKER.import_(Path("/base.tar"), "b:1", changes) == ["/d", *words, "b:1"]
    assert plain.pull("node@sha256:1") == ["/p", "pull", "docker://node@sha256:1"]
    assert plain.pull("localhost:5000/n") == ["/p", "pull", "--tls-verify=false", "docker://localhost:5000/n"]
    assert DOCKER.pull("127.0.0.1:5000/n") == ["/d", "pull", "127.0.0.1:5000/n"]
    assert plain.remove_container("n") == ["/p", "rm", "--force", "--volumes", "--time", "0", "n"]
    assert DOCKER.remove_container("n") == ["/d", "rm", "--force", "--volumes", "n"]
    # podman 3 has no --time; 30 has.
    assert replace(plain, version="3.4.4").remove_container("n") == ["/p", "rm", "--force", "--volumes", "n"]
    assert "--time" in replace(plain, version="30.0.0").remove_container("n")
    assert plain.healthcheck("n", "curl x") == ["/p", "healthcheck", "run", "n"]
    assert DOCKER.healthcheck("n", "curl x") == ["/d", "exec", "n", "/bin/sh", "-c", "curl x"]


@pytest.mark.parametrize(
    ("name", "podman_says"),
    [
        ("opencode-server", "localhost/opencode-server:latest"),
        ("opencode-server:candidate", "localhost/opencode-server:candidate"),
        ("registry.example.com:5000/team/image", "registry.example.com:5000/team/image:latest"),
        ("team/image:1", "team/image:1"),
        ("node@sha256:12", "node@sha256:12"),
        ("sha256:12", "sha256:12"),
    ],
)
def test_podman_keeps_what_was_made_here_under_localhost(name: str, podman_says: str) -> None:
    assert PODMAN.local(name) == podman_says
    assert DOCKER.local(name) == podman_says.removeprefix("localhost/")


def test_adaptations_go_from_none_to_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    hard = {number: value for (_, number), value in zip(engines.LIMITS, (1024, -1), strict=True)}
    monkeypatch.setattr(resource, "getrlimit", lambda number: (0, hard[number]))
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/runc")
    limits = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=16384:16384")
    runc = ("--runtime", "runc")
    plain = Engine("podman", "/p", "4")
    tries = [((), ()), ((), limits), (runc, ()), (runc, limits)]
    found = [(each.flags, each.limits, each.bounded) for each in adaptations(plain)]
    assert found == [(*each, bounded) for bounded in (True, False) for each in tries]
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert [(each.flags, each.limits) for each in adaptations(plain)] == tries[:2] * 2
    assert adaptations(DOCKER) == [DOCKER, replace(DOCKER, bounded=False)]


def test_podman_that_works_is_taken_before_docker(place: Place) -> None:
    place("docker", docker("20.10.24"))
    program = place("podman", podman())
    found = find()
    assert (found.name, found.program, found.version, found.store) == (
        *("podman", str(program), "4.3.1", "/var/lib/containers/storage"),
    )
    assert (found.flags, found.limits) == ((), ())
    assert find("docker").name == "docker"


def test_the_images_of_a_remote_podman_are_not_ours_to_read(place: Place) -> None:
    place("podman", podman(remote=True))
    found, _ = look("podman")
    assert found
    assert found.store == ""


def test_a_client_without_a_daemon_is_no_engine(place: Place) -> None:
    bare = place("docker", docker("28.2.2", daemon=False, buildx=True))
    real = place("docker", docker("20.10.24"))
    found, why = look("docker")
    assert found
    assert found.program == str(real)
    assert why == [f"{bare}: Cannot connect to the Docker daemon at unix:///var/run/docker.sock."]


@pytest.mark.parametrize(
    ("first", "second", "taken", "buildkit"),
    [
        (("28.2.2", False), ("20.10.24", False), 1, True),
        (("28.2.2", True), ("20.10.24", False), 0, True),
        (("28.2.2", False), ("27.0.1", False), 0, False),
    ],
)
def test_of_two_clients_the_one_that_can_buildkit_is_taken(
    place: Place, first: tuple[str, bool], second: tuple[str, bool], taken: int, *, buildkit: bool, tmp_path: Path
) -> None:
    programs = [
        place("docker", docker(version, buildx=buildx, root=str(tmp_path))) for version, buildx in (first, second)
    ]
    found, _ = look("docker")
    assert found == Engine("docker", str(programs[taken]), "20.10.24", str(tmp_path), buildkit=buildkit)


def test_the_same_program_twice_on_path_is_asked_once(place: Place) -> None:
    program = place("podman", "echo out of order >&2; exit 125")
    twin = place("other", "exit 0").with_name("podman")
    twin.symlink_to(program)
    assert look("podman") == (None, [f"{program}: out of order"])


def test_a_broken_podman_is_passed_over_for_a_docker_that_works(place: Place) -> None:
    place("podman", podman(run="echo crun: setrlimit failed >&2; exit 126"))
    assert find_error("podman").what.endswith("cannot start a container")
    place("docker", docker("20.10.24"))
    assert find().name == "docker"


def find_error(setting: str) -> EngineBroken:
    with pytest.raises(EngineBroken) as caught:
        find(setting)
    return caught.value


def test_a_broken_engine_gets_a_hint_and_its_own_words(place: Place) -> None:
    said = 'Error: could not find "netavark" in one of [/usr/local/libexec/podman]'
    place("podman", podman(run=f"echo '{said}' >&2; exit 125"))
    error = find_error("auto")
    assert "Install netavark and aardvark-dns" in error.remedy
    assert error.details == said


@pytest.mark.parametrize("script", ["echo nonsense", "echo '{}'", "echo '[]'", "kill -9 $$", "sleep 60"])
def test_a_program_that_says_nonsense_or_hangs_is_no_engine(
    place: Place, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "ASK_SECONDS", 0.3)
    programs = [place(name, script.replace("sleep", "/bin/sleep")) for name in ("podman", "docker")]
    with pytest.raises(NoEngine) as caught:
        find()
    assert all(f"{program}: " in caught.value.what for program in programs)


def test_a_container_that_hangs_at_its_start_is_a_broken_engine(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "ASK_SECONDS", 0.3)
    program = place("podman", podman(run="/bin/sleep 60"))
    assert "0.3 s" in find_error("podman").details
    assert f"rm --force --volumes --time 0 {'opencode-server-proof'}" in program.with_name("podman.log").read_text()


@pytest.mark.usefixtures("place")
def test_nothing_installed_says_so_of_each() -> None:
    with pytest.raises(NoEngine, match="podman is not installed; docker is not installed"):
        find()
    with pytest.raises(NoEngine) as caught:
        find("docker")
    assert caught.value.what == "docker is not installed"
    assert "inv setup" in caught.value.remedy


def test_a_podman_that_was_proven_is_not_asked_again_and_a_new_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "BUILD", tmp_path / "build")
    monkeypatch.setattr(engines, "prove", lambda engine: replace(engine, flags=("--runtime", "runc")))
    monkeypatch.setenv("PATH", str(tmp_path))
    podman, asked = tmp_path / "podman", []
    podman.write_text("#!/bin/sh")
    podman.chmod(0o755)

    def look(name: str) -> tuple[Engine, list[str]]:
        asked.append(name)
        return Engine("podman", str(podman), "4.3.1", store="/store"), []

    monkeypatch.setattr(engines, "look", look)
    assert replace(find(), platform="linux/arm64") == find("auto", "linux/arm64"), "no platform is remembered"
    assert find() == find() == Engine("podman", str(podman), "4.3.1", store="/store", flags=("--runtime", "runc"))
    assert asked == ["podman"]
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", "/other")
    find()
    assert len(asked) == 2
    os.utime(podman, (1, 1))
    find()
    assert len(asked) == 3


def test_flags_are_proven_once_a_boot_and_again_when_anything_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "BUILD", tmp_path / "build")
    asked: list[Engine] = []

    def prove(engine: Engine) -> Engine:
        asked.append(engine)
        return replace(engine, flags=("--runtime", "runc"), limits=("--ulimit", "nproc=9:9"))

    monkeypatch.setattr(engines, "prove", prove)
    plain = Engine("podman", "/p", "4.3.1")
    assert adapt(plain) == adapt(plain) == prove(plain)
    assert [path.name for path in (tmp_path / "build").iterdir()] == ["engine-podman.json"]
    del asked[:]
    adapt(replace(plain, version="5.0.0"))
    adapt(replace(plain, version="5.0.0", program="/other"))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1, 2))
    adapt(replace(plain, version="5.0.0", program="/other"))
    record = tmp_path / "build" / "engine-podman.json"
    known = json.loads(record.read_text())
    known["circumstances"][0] = "another boot"
    record.write_text(json.dumps(known))
    adapt(replace(plain, version="5.0.0", program="/other"))
    record.write_text("{")
    adapt(replace(plain, version="5.0.0", program="/other"))
    assert len(asked) == 5


def test_the_flags_that_let_a_container_start_are_kept(place: Place) -> None:
    refuse = """case "$* $flags" in *nofile=*runc*) ;; *) echo "crun: setrlimit" >&2; exit 126 ;; esac"""
    program = place("podman", podman(run=refuse))
    place("runc", "exit 0")
    found = find()
    assert found.flags == ("--runtime", "runc")
    assert found.limits[0::2] == ("--ulimit", "--ulimit")
    assert describe(found).startswith(f"podman 4.3.1 ({program}), with --runtime runc --ulimit nofile=")
    ran = [line for line in program.with_name("podman.log").read_text().splitlines() if " rm " in f" {line} "]
    assert len(ran) == 3  # what a failed try left behind


def test_an_image_that_is_not_here(place: Place) -> None:
    program = place("podman", "exit 125")
    engine = Engine("podman", str(program), "4")
    assert engine.image("x") is None
    with pytest.raises(EngineBroken, match="cannot tag x as y:1"):
        engine.tag("x", "y:1")


def test_a_question_is_given_up_after_a_while_even_when_nobody_said_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float | None] = []

    def run(argv: list[str], *, timeout: float | None = None, env: dict[str, str]) -> process.Completed:
        assert env == {"DOCKER_BUILDKIT": "1", "BUILDX_BUILDER": "", "A": "1"}
        waits.append(timeout)
        return process.Completed(tuple(argv), 1, "", "", 0.0)

    monkeypatch.setattr(process, "run", run)
    DOCKER.ask(["/d", "ps"], env={"A": "1"})
    DOCKER.ask(["/d", "ps"], timeout=7, env={"A": "1"})
    assert waits == [300, 7]


def test_of_the_containers_of_builds_only_those_that_can_be_ours_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    rows = {
        "ours": (["buildah"], 100, "runtime"),
        "step": (["buildah"], 101, "base"),
        "older": (["buildah"], 99, "base"),
        "elsewhere": (["buildah"], 101, "other"),
        "scratch": (["buildah"], 101, ""),
        "running": (["sh"], 101, "base"),
    }
    listed = [{"Id": name, "Command": row[0], "Created": row[1], "ImageID": row[2]} for name, row in rows.items()]
    bottoms = {"base": ["b"], "runtime": ["b", "r"], "other": ["o", "b"]}

    def run(argv: list[str], **_: object) -> process.Completed:
        asked.append(argv)
        said = json.dumps(listed) if argv[1] == "ps" else ""
        if argv[1] == "image" and argv[3] in bottoms:
            said = json.dumps([{"RootFS": {"Layers": bottoms[argv[3]]}}])
        return process.Completed(tuple(argv), int(not said), said, "", 0.0)

    monkeypatch.setattr(process, "run", run)
    plain = replace(PODMAN, flags=())
    plain.remove_working_containers(100.9, "base")
    assert [argv[-1] for argv in asked if argv[1] == "rm"] == ["ours", "step"]
    del asked[:]
    plain.remove_working_containers(100.9, "a base that is not here")
    assert [argv for argv in asked if argv[1] == "rm"] == []
    del asked[:]
    DOCKER.remove_working_containers(0, "base")
    assert asked == []


def test_the_proof_program_runs_and_ends_well(tmp_path: Path) -> None:
    program = tmp_path / "exit0"
    program.write_bytes(exit_program(platform.machine()))
    program.chmod(0o755)
    assert subprocess.run([program], check=False).returncode == 0


@pytest.mark.parametrize(("machine", "number"), [("x86_64", 62), ("aarch64", 183), ("arm64", 183)])
def test_the_proof_program_is_a_whole_elf_of_its_machine(machine: str, number: int) -> None:
    program = exit_program(machine)
    assert program[:7] == b"\x7fELF\x02\x01\x01"
    kind, machine_number, version, entry, program_headers = struct.unpack_from("<HHIQQ", program, 16)
    assert (kind, machine_number, version, entry, program_headers) == (2, number, 1, 0x400000 + 120, 64)
    load, flags, offset, address, _, size, memory, _ = struct.unpack_from("<IIQQQQQQ", program, 64)
    assert (load, flags, offset, address) == (1, 5, 0, 0x400000)
    assert size == memory == len(program)
    if number == 183:
        x0, x8, svc = struct.unpack_from("<III", program, 120)
        assert (x0, x8, svc) == (0xD2800000, 0xD2800000 | 93 << 5 | 8, 0xD4000001)


# What podman 4.3.1 writes when it looks for node:20-slim, with a mirror in registries.conf that does not have it.
LOG = """
time="2026-11-24T17:52:58Z" level=debug msg="Trying to access \\"mirror.example.com/hub/library/node:20-slim\\""
time="2026-11-24T17:52:58Z" level=debug msg="GET https://mirror.example.com/v2/"
time="2026-11-24T17:52:58Z" level=debug msg="GET https://mirror.example.com/v2/hub/library/node/manifests/20-slim"
time="2026-11-24T17:52:58Z" level=debug msg="Trying to access \\"example.com/library/node:20-slim\\""
time="2026-11-24T17:52:58Z" level=debug msg="GET https://api.example.com:5000/v2/"
time="2026-11-24T17:52:58Z" level=debug msg="GET https://api.example.com:5000/v1/_ping"
"""


@pytest.mark.parametrize(
    ("engine", "said", "name", "repository"),
    [
        (PODMAN, LOG, "node:20-slim", "api.example.com:5000/library/node"),
        (PODMAN, "Error: no such image", "node:20-slim", ""),
        (DOCKER, "https://index.example.com/v1/\n", "node:20-slim", "index.example.com/library/node"),
        (DOCKER, "https://index.example.com/v1/\n", "team/node:20-slim", "index.example.com/team/node"),
        (DOCKER, "\n", "node:20-slim", ""),
    ],
)
def test_the_engine_says_which_registry_a_short_name_means(
    engine: Engine, said: str, name: str, repository: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = ("", said) if engine.podman else (said, "")
    monkeypatch.setattr(process, "run", lambda argv, **_: process.Completed(tuple(argv), 1, out, err, 0.0))
    assert engine.repository_of(name) == repository
