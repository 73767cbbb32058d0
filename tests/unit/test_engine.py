"""podman and docker: exact command lines, and which of several programs on PATH is taken."""

import json
import os
import platform
import resource
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.core import process
from pipeline.core.errors import ComposeMissing, EngineBroken, NoEngine
from pipeline.engines import detect
from pipeline.engines.detect import adaptations, answering, describe, exit_program, find
from pipeline.engines.engine import PODMAN_COMPOSE, Engine

PODMAN = Engine(
    "podman", "/p", "4.3.1", flags=("--runtime", "runc"), limits=("--ulimit", "nproc=9:9")
)
DOCKER = Engine("docker", "/d", "20.10.24", buildkit=True)

Place = Callable[..., Path]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Put a program on a PATH that holds nothing else; each call adds a directory behind the
    others.
    """
    monkeypatch.setattr(detect, "BUILD", tmp_path / "build")
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


LIMITED = "4294967296 1024"


def podman(
    *,
    run: str = "exit 0",
    build: str = "exit 0",
    inspect: str = LIMITED,
    remote: bool = False,
    driver: str = "overlay",
) -> str:
    """A podman that answers, has the proof image, and does ``run`` for run."""
    info = f"4.3.1 {str(remote).lower()} false {driver} /var/lib/containers/storage"
    return f"""
echo "$*" >> "$0.log"
case "$1" in --runtime) flags="$1 $2"; shift 2 ;; esac
case "$1" in
    info) echo '{info}' ;;
    image) echo '[{{"Id": "sha256:abc"}}]' ;;
    run) {run} ;;
    build) {build} ;;
    inspect) echo {inspect} ;;
esac"""


def docker(
    version: str, *, daemon: bool = True, buildx: bool = False, root: str = "/nowhere"
) -> str:
    plugins = [{"Name": "buildx"}] if buildx else []
    info: dict[str, object] = {"ClientInfo": {"Plugins": plugins}}
    info |= (
        {"ServerVersion": "20.10.24", "DockerRootDir": root}
        if daemon
        else {
            "ServerErrors": ["Cannot connect to the Docker daemon at unix:///var/run/docker.sock."]
        }
    )
    return f"""
case "$1" in
    info) echo '{json.dumps(info)}'; exit {int(not daemon)} ;;
    version) echo {version} ;;
    image) echo '[{{}}]' ;;
    inspect) echo {LIMITED} ;;
esac"""


def line(argv: list[str]) -> str:
    """Return a command as one would type it."""
    return shlex.join(argv)


HARDENED = "--read-only --tmpfs /tmp:exec --cap-drop all --security-opt no-new-privileges"
BOUNDED = "--memory 4g --pids-limit 1024"


def test_build() -> None:
    where = {"tag": "opencode-server:candidate", "containerfile": Path("/src/Containerfile")}
    arguments = {"build_args": {"BASE": "b", "RUNTIME": "r"}, "cache": False}
    head = "build --file /src/Containerfile --tag"
    middle = "--no-cache --build-arg BASE=b --build-arg RUNTIME=r"
    assert line(PODMAN.build(Path("/src"), **where, **arguments)) == (  # type: ignore[arg-type]
        f"/p --runtime runc {head} localhost/opencode-server:candidate {middle}"
        " --format docker --ulimit nproc=9:9 /src"
    )
    assert line(DOCKER.build(Path("/src"), **where, **arguments)) == (  # type: ignore[arg-type]
        f"/d {head} opencode-server:candidate {middle} --progress plain /src"
    )
    legacy = replace(DOCKER, buildkit=False)
    assert line(legacy.build(Path("/src"), **where)) == (  # type: ignore[arg-type]
        f"/d {head} opencode-server:candidate /src"
    )
    # A builder of the user's own has none of the images that are here.
    assert PODMAN.env == {"BUILDAH_FORMAT": "", "BUILDAH_LAYERS": ""}
    unset = {"DOCKER_DEFAULT_PLATFORM": "", "DOCKER_CONTENT_TRUST": ""}
    assert DOCKER.env == {"DOCKER_BUILDKIT": "1", "BUILDX_BUILDER": "default", **unset}
    assert legacy.env == {"DOCKER_BUILDKIT": "0", "BUILDX_BUILDER": "default", **unset}


def test_another_platform() -> None:
    podman = replace(PODMAN, flags=(), limits=(), platform="linux/arm64")
    docker = replace(DOCKER, platform="linux/arm64")
    for engine in (podman, docker):
        built = engine.build(Path("/src"), tag="t", containerfile=Path("/c"))
        assert line(built).endswith("--platform linux/arm64 /src")
    assert line(podman.pull("n@sha256:1")) == "/p pull --platform linux/arm64 docker://n@sha256:1"
    assert line(docker.pull("n@sha256:1")) == "/d pull --platform linux/arm64 n@sha256:1"
    # podman's import has no --platform, and docker's no --arch.
    tar = Path("/b.tar")
    assert line(podman.import_(tar, "a/b:1")) == "/p import --os linux --arch arm64 /b.tar a/b:1"
    assert line(docker.import_(tar, "a/b:1")) == "/d import --platform linux/arm64 /b.tar a/b:1"


def test_run_and_exec() -> None:
    run = PODMAN.run(
        *("i", "-c", "true"),
        detach=True,
        name="n",
        env=["SECRET", "A=1"],
        publish="127.0.0.1::4096",
        network="",
        label="k=v",
        volume=["/state", "v:/work"],
    )
    assert line(run) == (
        f"/p --runtime runc run {HARDENED} --user 1000:1000 {BOUNDED} --detach --name n"
        " --env SECRET --env A=1 --publish 127.0.0.1::4096 --label k=v"
        " --volume /state --volume v:/work --ulimit nproc=9:9 i -c true"
    )
    once = f"/d run {HARDENED} --user 1000:1000 {BOUNDED} --rm --name n i"
    assert line(DOCKER.run("i", name="n", rm=True)) == once.replace(
        "--rm --name n", "--name n --rm"
    )
    rootless = replace(DOCKER, rootless=True, bounded=False)
    assert line(rootless.run("i", rm=True)) == f"/d run {HARDENED} --rm i"
    assert line(DOCKER.run("i", hardened=False, rm=True, user="0")) == "/d run --rm --user 0 i"
    assert line(PODMAN.exec("n", "env", env=["A=1", "B"], detach=False)) == (
        "/p --runtime runc exec --env A=1 --env B n env"
    )


def test_the_commands_in_which_the_two_differ() -> None:
    plain = replace(PODMAN, flags=())
    changes = ["ENV A=1", 'CMD ["node"]']
    words = "import --change 'ENV A=1' --change 'CMD [\"node\"]' /base.tar"
    assert line(plain.import_(Path("/base.tar"), "b:1", changes)) == f"/p {words} localhost/b:1"
    assert line(DOCKER.import_(Path("/base.tar"), "b:1", changes)) == f"/d {words} b:1"
    assert line(plain.pull("node@sha256:1")) == "/p pull docker://node@sha256:1"
    assert line(plain.pull("localhost:5000/n")) == (
        "/p pull --tls-verify=false docker://localhost:5000/n"
    )
    assert [line(each) for each in plain.index("localhost:5000/n:1", ["localhost:5000/n@a"])] == [
        "/p manifest create localhost:5000/n:1",
        "/p manifest add --tls-verify=false localhost:5000/n:1 docker://localhost:5000/n@a",
        (
            "/p manifest push --all --digestfile /dev/stdout --tls-verify=false"
            " localhost:5000/n:1 docker://localhost:5000/n:1"
        ),
    ]
    assert [line(each) for each in DOCKER.index("r.io/n:1", ["r.io/n@a", "r.io/n@b"])] == [
        "/d manifest create r.io/n:1 r.io/n@a r.io/n@b",
        "/d manifest push r.io/n:1",
    ]
    assert "--insecure" in DOCKER.index("127.0.0.1:5000/n:1", [])[1]
    assert line(DOCKER.pull("127.0.0.1:5000/n")) == "/d pull 127.0.0.1:5000/n"
    assert line(plain.push("127.0.0.1:5000/n:1")) == (
        "/p push --digestfile /dev/stdout --tls-verify=false 127.0.0.1:5000/n:1"
    )
    assert line(DOCKER.push("127.0.0.1:5000/n:1")) == "/d push 127.0.0.1:5000/n:1"
    assert line(plain.remove_container("n")) == "/p rm --force --volumes --time 0 n"
    assert line(DOCKER.remove_container("n")) == "/d rm --force --volumes n"
    # podman 3 has no --time; 30 has.
    old, new = (replace(plain, version=version) for version in ("3.4.4", "30.0.0"))
    assert line(old.remove_container("n")) == "/p rm --force --volumes n"
    assert "--time 0" in line(new.remove_container("n"))
    assert line(plain.healthcheck("n", "curl x")) == "/p healthcheck run n"
    assert line(DOCKER.healthcheck("n", "curl x")) == "/d exec n /bin/sh -c 'curl x'"


def test_compose_with_both_engines() -> None:
    where = (Path("/deploy/compose.yaml"), "opencode", Path("/home/server.env"))
    common = "--project-name opencode --env-file /home/server.env --file /deploy/compose.yaml"
    assert line(DOCKER.compose(["/d", "compose"], *where, "up", "--detach")) == (
        f"/d compose {common} up --detach"
    )
    program = PODMAN.find_compose()
    assert line(program) == f"{sys.executable} -P {PODMAN_COMPOSE}"
    assert line(PODMAN.compose(program, *where, "down")) == (
        f"{line(program)} {common} --in-pod=false --podman-path /p"
        " '--podman-args=--runtime runc' '--podman-run-args=--ulimit nproc=9:9' down"
    )


def test_compose_of_docker_is_a_plugin_or_a_program(place: Place) -> None:
    program = place("docker", "exit $(cat $0.code)")
    engine = Engine("docker", str(program), "28")
    code = program.with_name("docker.code")
    place("cat", "/bin/cat $1")
    code.write_text("0")
    assert engine.find_compose() == [str(program), "compose"]
    code.write_text("1")
    with pytest.raises(ComposeMissing, match="has no Compose plugin"):
        engine.find_compose()
    standalone = place("docker-compose", "exit 0")
    assert engine.find_compose() == [str(standalone)]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            DOCKER.exec("n", "bash", interactive=True, tty=True, user="1:1"),
            "exec --interactive --tty --user 1:1 n bash",
        ),
        (DOCKER.logs("n", 5), "logs --tail 5 n"),
        (DOCKER.logs("n", 5, follow=True), "logs --tail 5 --follow n"),
        (DOCKER.inspect("n"), "inspect --type container --format '{{json .}}' n"),
        (DOCKER.inspect("n", "{{.X}}"), "inspect --type container --format '{{.X}}' n"),
        (DOCKER.kill("n"), "kill --signal TERM n"),
        (DOCKER.memory(["a", "b"]), "stats --no-stream --format '{{.Name}}\t{{.MemUsage}}' a b"),
        (DOCKER.stop(["a", "b"], 60), "stop -t 60 a b"),
        (DOCKER.remove_network("n"), "network rm n"),
        (DOCKER.list_volumes(), "volume ls --quiet"),
        (
            DOCKER.list_volumes("p"),
            "volume ls --quiet --filter label=com.docker.compose.project=p",
        ),
        (DOCKER.remove_image("i"), "rmi i"),
        (DOCKER.manifest("r@sha256:1"), "manifest inspect r@sha256:1"),
    ],
)
def test_commands_that_are_the_same_for_both(argv: list[str], expected: str) -> None:
    assert line(argv) == f"/d {expected}"


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
    hard = {number: value for (_, number), value in zip(detect.LIMITS, (1024, -1), strict=True)}
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
    assert list(adaptations(DOCKER)) == [DOCKER, replace(DOCKER, bounded=False)]


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
    assert answering("podman").store == ""


def test_a_client_without_a_daemon_is_no_engine(place: Place) -> None:
    bare = place("docker", docker("28.2.2", daemon=False, buildx=True))
    real = place("docker", docker("20.10.24"))
    assert answering("docker").program == str(real)
    real.unlink()
    with pytest.raises(NoEngine) as caught:
        answering("docker")
    assert caught.value.what == (
        f"{bare}: Cannot connect to the Docker daemon at unix:///var/run/docker.sock."
    )


@pytest.mark.parametrize(
    ("first", "second", "taken", "buildkit"),
    [
        (("28.2.2", False), ("20.10.24", False), 1, True),
        (("28.2.2", True), ("20.10.24", False), 0, True),
        (("28.2.2", False), ("27.0.1", False), 0, False),
    ],
)
def test_of_two_clients_the_one_that_can_buildkit_is_taken(
    place: Place,
    first: tuple[str, bool],
    second: tuple[str, bool],
    taken: int,
    *,
    buildkit: bool,
    tmp_path: Path,
) -> None:
    programs = [
        place("docker", docker(version, buildx=buildx, root=str(tmp_path)))
        for version, buildx in (first, second)
    ]
    assert answering("docker") == Engine(
        "docker", str(programs[taken]), "20.10.24", str(tmp_path), buildkit=buildkit
    )


def test_the_same_program_twice_on_path_is_asked_once(place: Place) -> None:
    program = place("podman", "echo out of order >&2; exit 125")
    twin = place("other", "exit 0").with_name("podman")
    twin.symlink_to(program)
    with pytest.raises(NoEngine) as caught:
        answering("podman")
    assert caught.value.what == f"{program}: out of order"


def test_a_broken_podman_is_passed_over_for_a_docker_that_works(place: Place) -> None:
    place("podman", podman(run="echo crun: setrlimit failed >&2; exit 126"))
    assert find_error("podman").what.endswith("cannot start a container: crun: setrlimit failed")
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


@pytest.mark.parametrize(
    "script", ["echo nonsense", "echo '{}'", "echo '[]'", "kill -9 $$", "sleep 60"]
)
def test_a_program_that_says_nonsense_or_hangs_is_no_engine(
    place: Place, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detect, "ASK_SECONDS", 0.3)
    programs = [place(name, script.replace("sleep", "/bin/sleep")) for name in ("podman", "docker")]
    with pytest.raises(NoEngine) as caught:
        find()
    assert all(f"{program}: " in caught.value.what for program in programs)


def test_a_container_that_hangs_at_its_start_is_a_broken_engine(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detect, "ASK_SECONDS", 0.3)
    program = place("podman", podman(run="/bin/sleep 60"))
    assert "0.3 s" in find_error("podman").details
    assert (
        f"rm --force --volumes --time 0 {'opencode-server-proof'}"
        in program.with_name("podman.log").read_text()
    )


@pytest.mark.usefixtures("place")
def test_nothing_installed_says_so_of_each() -> None:
    with pytest.raises(NoEngine, match="podman is not installed; docker is not installed"):
        find()
    with pytest.raises(NoEngine) as caught:
        find("docker")
    assert caught.value.what == "docker is not installed"
    assert "inv setup" in caught.value.remedy


def test_a_proof_is_remembered_until_something_it_depends_on_changes(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = place("podman", podman(run='echo "$flags" | grep -q runc'))
    place("grep", '/bin/grep "$@"')
    place("runc", "exit 0")

    def proofs() -> int:
        """Return how often ``podman info`` was asked."""
        return program.with_name("podman.log").read_text().count("info --format")

    first = find()
    assert first.flags == ("--runtime", "runc")
    assert find() == first
    assert find("auto", "linux/arm64") == replace(first, platform="linux/arm64")
    assert find().platform == ""  # a platform is not remembered
    assert proofs() == 1
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", "/other")
    find()
    assert proofs() == 2
    os.utime(program, (1, 1))
    find()
    assert proofs() == 3
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1, 2))
    find()
    assert proofs() == 4
    record = tmp_path / "build" / "engine-podman.json"
    known = json.loads(record.read_text())
    known["circumstances"][0] = "another boot"
    record.write_text(json.dumps(known))
    find()
    assert proofs() == 5
    record.write_text("{")
    find()
    assert proofs() == 6


def test_a_daemon_is_asked_each_time(place: Place) -> None:
    program = place("docker", docker("28.2.2"))
    assert find("docker").name == "docker"
    program.write_text(
        f"#!/bin/sh\n{docker('28.2.2', daemon=False)}\n".replace(
            "version) echo", "version) exit 1;"
        )
    )
    with pytest.raises(NoEngine, match="Cannot connect to the Docker daemon"):
        find("docker")


def test_the_flags_that_let_a_container_start_are_kept(place: Place) -> None:
    refuse = (
        """case "$* $flags" in *nofile=*runc*) ;; *) echo "crun: setrlimit" >&2; exit 126 ;; esac"""
    )
    program = place("podman", podman(run=refuse))
    place("runc", "exit 0")
    found = find()
    assert found.flags == ("--runtime", "runc")
    assert found.limits[0::2] == ("--ulimit", "--ulimit")
    assert describe(found).startswith(
        f"podman 4.3.1 ({program}), with --runtime runc --ulimit nofile="
    )
    ran = [
        line
        for line in program.with_name("podman.log").read_text().splitlines()
        if " rm " in f" {line} "
    ]
    assert len(ran) == 4  # each try


def test_the_flags_that_let_a_build_run_are_kept(place: Place) -> None:
    refuse = 'case "$*" in *nofile=*) ;; *) echo "error setting rlimit type 7" >&2; exit 1 ;; esac'
    place("podman", podman(build=refuse))
    assert find().limits[0::2] == ("--ulimit", "--ulimit")


def test_limits_that_are_ignored_are_none(place: Place) -> None:
    place("podman", podman(inspect="0 0"))
    found = find()
    assert not found.bounded
    assert "no limits on memory or processes" in describe(found)
    assert "memory" not in found.hardened


def test_slow_storage_and_variables_that_do_not_apply_are_named(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place("podman", podman(driver="vfs"))
    monkeypatch.setenv("BUILDAH_LAYERS", "false")
    monkeypatch.setenv("DOCKER_DEFAULT_PLATFORM", "linux/arm64")
    found = find()
    assert found.vfs
    assert describe(found).endswith("vfs, which copies every layer not your BUILDAH_LAYERS")
    assert describe(DOCKER).endswith("not your DOCKER_DEFAULT_PLATFORM")


@pytest.mark.parametrize("info", [{"host": {}}, {"ServerVersion": "4.3.1", "BuildahVersion": "1"}])
def test_podman_under_dockers_name_is_named(place: Place, info: dict[str, object]) -> None:
    place("docker", f"echo '{json.dumps(info)}'")
    with pytest.raises(NoEngine, match="this is podman under docker's name"):
        answering("docker")


def test_a_size_is_that_of_the_unpacked_layers_in_containerds_store_too(place: Place) -> None:
    info = {
        "ServerVersion": "28",
        "ClientInfo": {"Plugins": [{"Name": "buildx"}], "Context": "office"},
        "DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]],
    }
    place(
        "docker",
        f"""case "$1 $2" in
    info*) echo '{json.dumps(info)}' ;;
    version*) echo 28 ;;
    "image inspect") echo '[{{"Id": "x", "Size": 3}}]' ;;
    "history --format") printf '5\\n0\\n7\\n' ;;
esac""",
    )
    engine = answering("docker")
    assert engine.image("x") == {"Id": "x", "Size": 12}
    assert engine.env["BUILDX_BUILDER"] == "office"


def test_an_image_that_is_not_here(place: Place) -> None:
    program = place("podman", "exit 125")
    engine = Engine("podman", str(program), "4")
    assert engine.image("x") is None
    with pytest.raises(EngineBroken, match="tag x localhost/y:1 exited with 125"):
        engine.tag("x", "y:1")


def test_a_question_is_given_up_after_a_while_even_when_nobody_said_how_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float | None] = []

    def run(
        argv: list[str], *, timeout: float | None = None, env: dict[str, str]
    ) -> process.Completed:
        assert env == {**DOCKER.env, "A": "1"}
        waits.append(timeout)
        return process.Completed(tuple(argv), 1, "", "", 0.0)

    monkeypatch.setattr(process, "run", run)
    DOCKER.ask(["/d", "ps"], env={"A": "1"})
    DOCKER.ask(["/d", "ps"], timeout=7, env={"A": "1"})
    assert waits == [300, 7]


def test_of_the_containers_of_builds_only_those_that_can_be_ours_are_removed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[str]] = []
    rows = {
        "ours": (["buildah"], 100, "runtime"),
        "step": (["buildah"], 101, "base"),
        "older": (["buildah"], 99, "base"),
        "elsewhere": (["buildah"], 101, "other"),
        "scratch": (["buildah"], 101, ""),
        "running": (["sh"], 101, "base"),
    }
    listed = [
        {"Id": name, "Command": row[0], "Created": row[1], "ImageID": row[2]}
        for name, row in rows.items()
    ]
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
    kind, machine_number, version, entry, program_headers = struct.unpack_from(
        "<HHIQQ", program, 16
    )
    assert (kind, machine_number, version, entry, program_headers) == (
        2,
        number,
        1,
        0x400000 + 120,
        64,
    )
    load, flags, offset, address, _, size, memory, _ = struct.unpack_from("<IIQQQQQQ", program, 64)
    assert (load, flags, offset, address) == (1, 5, 0, 0x400000)
    assert size == memory == len(program)
    if number == 183:
        x0, x8, svc = struct.unpack_from("<III", program, 120)
        assert (x0, x8, svc) == (0xD2800000, 0xD2800000 | 93 << 5 | 8, 0xD4000001)
