"""podman and docker: argv builders, and which of the two answers here.

Every difference between the two lives in this module and nowhere else. Builders are pure and return an argv;
``Engine.ask`` runs one.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shutil
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pipeline import process
from pipeline.errors import ComposeMissing, DiskFull, EngineBroken, NoEngine
from pipeline.records import read_json, write_json
from pipeline.settings import BUILD, Settings

Name = Literal["podman", "docker"]

PROOF_IMAGE = "opencode-server-proof:1"
ASK_SECONDS = 60.0
"""How long a program may take to say what it is, and a container of nothing to start: some hang for ever."""

STEERING = ("CONTAINER", "DOCKER", "XDG_", "HOME")
"""How the names of the variables begin that say where an engine and its images are."""

USER = "1000:1000"
"""``node`` in the image; any other would do."""

BOUNDS = ("--memory", "4g", "--pids-limit", "1024")
"""What a container of ours may take at most; a rootless engine without a cgroup of its own can bound nothing."""

LIMITS = (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC))


@dataclass(frozen=True)
class Engine:
    """An engine that answers, with the flags it needs on this machine.

    ``store`` is the directory of its images, empty when that is on another machine or not ours to read.
    ``flags`` go before the sub-command, ``limits`` on each ``run`` and ``build``. ``rootless``: root in a container is
    the user here. ``bounded``: it can bound what a container takes. ``platform`` is what is built
    for, as in linux/arm64; empty is this machine's.
    """

    name: Name
    program: str
    version: str
    store: str = ""
    flags: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    buildkit: bool = False
    rootless: bool = False
    bounded: bool = True
    platform: str = ""

    @property
    def podman(self) -> bool:
        """Whether this is podman."""
        return self.name == "podman"

    @property
    def env(self) -> dict[str, str]:
        """What to add to the environment of its client."""
        # A builder in a container of its own, which BUILDX_BUILDER may name, sees none of this machine's images.
        return {} if self.podman else {"DOCKER_BUILDKIT": "1" if self.buildkit else "0", "BUILDX_BUILDER": ""}

    @property
    def hardened(self) -> list[str]:
        """What takes from a container all that the server does not need; as root only where root is the user."""
        # docker's own choice for a tmpfs is noexec, and OpenCode loads libraries that it unpacks there.
        words = ["--read-only", "--tmpfs", "/tmp:exec", "--cap-drop", "all", "--security-opt", "no-new-privileges"]  # noqa: S108 -- in the container
        return [*words, *([] if self.rootless else ["--user", USER]), *(BOUNDS if self.bounded else ())]

    def local(self, name: str) -> str:
        """Return the reference of an image that was made here: podman keeps those under ``localhost/``."""
        if "@" in name or name.startswith("sha256:"):
            return name
        tagged = name if ":" in name.rsplit("/", 1)[-1] else f"{name}:latest"
        return f"localhost/{tagged}" if self.podman and "/" not in tagged else tagged

    def argv(self, *words: str) -> list[str]:
        """Return a command of this engine."""
        return [self.program, *self.flags, *words]

    def build(
        self,
        context: Path,
        *,
        tag: str,
        containerfile: Path,
        target: str = "",
        build_args: Mapping[str, str] | None = None,
        cache: bool = True,
    ) -> list[str]:
        """Build ``context`` into an image called ``tag``."""
        words = ["build", "--file", str(containerfile), "--tag", self.local(tag)]
        if not cache:
            words.append("--no-cache")
        if target:
            words += ["--target", target]
        for key, value in (build_args or {}).items():
            words += ["--build-arg", f"{key}={value}"]
        if self.podman:
            # The OCI format has no HEALTHCHECK and drops it. Stages run one after the other unless told otherwise.
            words += ["--format", "docker", "--jobs", "4", *self.limits]
        elif self.buildkit:
            words += ["--progress", "plain"]
        return self.argv(*words, *self._for_platform(), str(context))

    def run(
        self,
        image: str,
        *command: str,
        name: str,
        env: Sequence[str] = (),
        publish: str = "",
        network: str = "",
        labels: Mapping[str, str] | None = None,
        volumes: Sequence[str] = (),
        keep: bool = True,
    ) -> list[str]:
        """Start a hardened container in the background; ``keep=False`` waits for it and removes it.

        ``env`` holds names only, or name=value for what is no secret: a value on the command line shows in ``ps``.
        """
        words = ["run", "--name", name, *self.limits, *self.hardened]
        words.append("--detach" if keep else "--rm")
        for variable in env:
            words += ["--env", variable]
        if publish:
            words += ["--publish", publish]
        if network:
            words += ["--network", network]
        for key, value in (labels or {}).items():
            words += ["--label", f"{key}={value}"]
        for volume in volumes:
            words += ["--volume", volume]
        return self.argv(*words, image, *command)

    def exec(
        self, container: str, *command: str, env: Sequence[str] = (), detach: bool = False, user: str = ""
    ) -> list[str]:
        """Run a command in a running container, as its user or another; ``detach`` does not wait for it."""
        words = [*(["--detach"] if detach else []), *(word for variable in env for word in ("--env", variable))]
        words += ["--user", user] if user else []
        return self.argv("exec", *words, container, *command)

    def play(self, network: str) -> list[str]:
        """Start the pod that is described on standard input, in a network; only podman plays pods."""
        return self.argv("kube", "play", "--network", network, "-")

    def remove_pod(self, name: str, seconds: int = 30) -> list[list[str]]:
        """End a pod's containers with SIGTERM, then remove it; its named volumes stay."""
        return [self.argv("pod", "stop", "--time", str(seconds), name), self.argv("pod", "rm", "--force", name)]

    def find_compose(self) -> list[str]:
        """Return Compose, as this client's plugin or, where it has none, as a program of its own.

        Raises ComposeMissing.
        """
        if self.ask([self.program, "compose", "version"], timeout=ASK_SECONDS).ok:
            return [self.program, "compose"]
        if old := shutil.which("docker-compose"):
            return [old]
        raise ComposeMissing(
            f"{self.program} has no Compose", "Install docker-compose-plugin or docker-compose, or use podman."
        )

    def compose(self, program: Sequence[str], file: Path, project: str, env_file: Path, *words: str) -> list[str]:
        """Have Compose, the ``program`` that was found, do something with a project."""
        return [*program, "--project-name", project, "--env-file", str(env_file), "--file", str(file), *words]

    def containers_conf(self, others: Mapping[str, Any]) -> tuple[str, str]:
        """Return podman's settings for what has no flag for them, the bounds on a pod's containers; and their variable.

        Since 4.5 they may come beside a user's own, and before that instead of them: then ``others`` are taken in.
        """
        limits = [limit for limit in self.limits if limit != "--ulimit"]
        ours: dict[str, Any] = {"pids_limit": int(BOUNDS[3])} if self.bounded else {}
        ours |= {"default_ulimits": limits} if limits else {}
        beside = tuple(map(int, self.version.split(".")[:2])) >= (4, 5)
        tables = {} if beside else {name: dict(table) for name, table in others.items()}
        tables.setdefault("containers", {}).update(ours)
        lines = [f"[{name}]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in table.items())
                 for name, table in tables.items()]  # fmt: skip
        return "\n".join(lines), "CONTAINERS_CONF_OVERRIDE" if beside else "CONTAINERS_CONF"

    def import_(self, tar: Path, tag: str, changes: Sequence[str] = ()) -> list[str]:
        """Make an image of one layer out of a root filesystem."""
        words = [word for change in changes for word in ("--change", change)]
        if self.platform and self.podman:
            words += ["--os", "linux", "--arch", self.platform.rpartition("/")[2]]
        elif self.platform:
            words += self._for_platform()
        return self.argv("import", *words, str(tar), self.local(tag))

    def pull(self, reference: str) -> list[str]:
        """Pull an image; a short name means Docker Hub, as it does to docker, whatever podman's short names say.

        A registry on loopback may speak plain HTTP, as docker allows it by itself.
        """
        if not self.podman:
            return self.argv("pull", *self._for_platform(), reference)
        return self.argv("pull", *_plain(reference), *self._for_platform(), f"docker://{reference}")

    def repository_of(self, name: str, *, timeout: float = ASK_SECONDS) -> str:
        """Return HOST/PATH of what a short ``name`` (with its tag) means to this engine; nothing if it does not say.

        Raises subprocess.TimeoutExpired.
        """
        if not self.podman:
            host = self.ask(self.argv("info", "--format", "{{.IndexServerAddress}}"), timeout=timeout).stdout.strip()
            path = name.rpartition(":")[0]
            return f"{urlsplit(host).netloc}/{path if '/' in path else f'library/{path}'}" if host else ""
        # No command prints it, but the log tells whom it asks: the mirrors in registries.conf, and the last of all.
        log = self.ask(self.argv("--log-level", "debug", "manifest", "inspect", name), timeout=timeout).stderr
        paths = re.findall(r'Trying to access \\?"[^/"]+/([^":]+)', log)
        hosts = re.findall(r"GET https?://([^/\s]+)/v2/", log)
        return f"{hosts[-1]}/{paths[-1]}" if hosts and paths else ""

    def push(self, reference: str) -> list[str]:
        """Push an image under its name; the digest it has there is the last ``sha256:`` on stdout."""
        told = [*_plain(reference), "--digestfile", "/dev/stdout"] if self.podman else []
        return self.argv("push", *told, reference)

    def _for_platform(self) -> list[str]:
        return ["--platform", self.platform] if self.platform else []

    def remove_container(self, name: str) -> list[str]:
        """Remove a container with its anonymous volumes, running or not, without waiting for it to end."""
        at_once = ["--time", "0"] if self.podman and not self.version.startswith("3.") else []  # podman 4.0 brought it
        return self.argv("rm", "--force", "--volumes", *at_once, name)

    def healthcheck(self, container: str, command: str) -> list[str]:
        """Run the image's own health check now. docker has no word for that: its ``command`` is run as docker does."""
        if self.podman:
            return self.argv("healthcheck", "run", container)
        return self.exec(container, "/bin/sh", "-c", command)

    def ask(
        self, argv: Sequence[str], *, timeout: float = 300, env: Mapping[str, str] | None = None
    ) -> process.Completed:
        """Run one of the commands above. Raises subprocess.TimeoutExpired after ``timeout`` seconds."""
        return process.run(argv, timeout=timeout, env={**self.env, **(env or {})})

    def follow(
        self, argv: Sequence[str], on_line: Callable[[str], None], *, env: Mapping[str, str] | None = None
    ) -> process.Completed:
        """Run one of the commands above, handing on its output line by line."""
        return process.run(argv, on_line=on_line, env={**self.env, **(env or {})})

    def remove_working_containers(self, since: float, base: str) -> None:
        """Remove what a build on ``base`` that began at ``since`` (time.time()) has left: podman, ended, leaves some.

        Nothing tells whose they are. Only those that began later, on an image made of ``base``, can be ours.
        """
        if not self.podman:
            return
        bottom = (self.image(base) or {"RootFS": {"Layers": [""]}})["RootFS"]["Layers"][0]
        done = self.ask(self.argv("ps", "--all", "--external", "--format", "json"), timeout=60)
        for container in json.loads(done.stdout or "[]"):
            if container["Command"] != ["buildah"] or container["Created"] < int(since):
                continue
            image = self.image(container["ImageID"])
            if image and image["RootFS"]["Layers"][0] == bottom:
                self.ask(self.remove_container(container["Id"]), timeout=60)

    def image(self, reference: str) -> dict[str, Any] | None:
        """Return what ``image inspect`` says of an image, or None when there is no such image here."""
        done = self.ask(self.argv("image", "inspect", reference))
        return json.loads(done.stdout)[0] if done.ok else None

    def save(self, image: str, archive: Path) -> None:
        """Write an image out as docker's archive: its size, of ours 0.8 GB. Raises DiskFull, EngineBroken."""
        done = self.ask(self.argv("save", "--output", str(archive), image))
        if not done.ok:
            failure = DiskFull if "no space left" in done.said.lower() else EngineBroken
            raise failure(f"{self.name} cannot write the image out to look into it", "See what it said.", done.said)

    def tag(self, source: str, *names: str) -> None:
        """Give an image more names. Raises EngineBroken."""
        for name in names:
            done = self.ask(self.argv("tag", source, self.local(name)))
            if not done.ok:
                raise EngineBroken(f"{self.name} cannot tag {source} as {name}", "See what it said.", done.said)


def _toml(value: Any) -> str:
    """Return a value as TOML writes it: JSON does, but for tables."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def _plain(reference: str) -> list[str]:
    return ["--tls-verify=false"] if reference.startswith(("127.0.0.1:", "localhost:")) else []


def find(setting: str = "auto", platform: str = "") -> Engine:
    """Return the engine that ``setting`` (auto, podman or docker) names, with the flags it needs here.

    It builds for ``platform``, or for this machine's own. Raises NoEngine when none answers, EngineBroken when one
    answers but can start no container.
    """
    names: list[Name] = ["podman", "docker"] if setting == "auto" else [setting]  # type: ignore[list-item]
    why, broken = [], None
    for name in names:
        # A podman on this machine needs no daemon: what was proven holds. A daemon has to be asked each time.
        known = remembered(name) if name == "podman" else None
        if known and known.store:
            return replace(known, platform=platform)
        found, reasons = look(name)
        why += reasons
        if found:
            try:
                return replace(adapt(found), platform=platform)
            except EngineBroken as error:
                broken = broken or error
    if broken:
        raise broken
    raise NoEngine(
        "; ".join(why), "Install one with: inv setup. If docker is installed, its daemon may need to be started."
    )


def of(settings: Settings) -> Engine:
    """Return the engine of the settings, for their platform: a task that left that out would ask of another base.

    Raises NoEngine, EngineBroken.
    """
    return find(settings.engine, settings.platform)


def look(name: Name) -> tuple[Engine | None, list[str]]:
    """Ask each program called ``name`` on PATH; return the first that answers, and why the others do not.

    A docker client without a daemon is not an engine; and of two clients of one daemon, the one that can do BuildKit
    is taken: since 23.0 that needs buildx, which distributions package apart.
    """
    programs = _programs(name)
    if not programs:
        return None, [f"{name} is not installed"]
    answers, why = [], []
    for program in programs:
        ask = _look_podman if name == "podman" else _look_docker
        try:
            found = ask(program)
        except subprocess.TimeoutExpired:
            found = f"no answer within {ASK_SECONDS:g} s"
        except (ValueError, KeyError, TypeError):
            found = f"its answer to `info` is not that of a {name}"
        if isinstance(found, Engine):
            answers.append(found)
        else:
            why.append(f"{program}: {found}")
    answers.sort(key=lambda engine: not engine.buildkit)
    return (answers[0] if answers else None), why


def _programs(name: str) -> list[str]:
    found: dict[Path, str] = {}
    for directory in os.get_exec_path():
        program = shutil.which(name, path=directory)
        if program:
            found.setdefault(Path(program).resolve(), program)
    return list(found.values())


def _look_podman(program: str) -> Engine | str:
    done = process.run([program, "info", "--format", "json"], timeout=ASK_SECONDS)
    if not done.ok:
        return done.said.splitlines()[-1] if done.said else f"exit code {done.code}"
    info = json.loads(done.stdout)
    remote = info["host"].get("serviceIsRemote", False)
    rootless = bool(info["host"].get("security", {}).get("rootless"))
    store = "" if remote else info["store"]["graphRoot"]
    return Engine("podman", program, info["version"]["Version"], store, rootless=rootless)


def _look_docker(program: str) -> Engine | str:
    done = process.run([program, "info", "--format", "{{json .}}"], timeout=ASK_SECONDS)
    info = json.loads(done.stdout) if done.stdout.strip().startswith("{") else {}
    if not info.get("ServerVersion"):
        errors = info.get("ServerErrors") or done.said.splitlines()
        return errors[-1] if errors else "no daemon answers"
    plugins = {plugin["Name"] for plugin in (info.get("ClientInfo") or {}).get("Plugins") or []}
    client = process.run([program, "version", "--format", "{{.Client.Version}}"], timeout=ASK_SECONDS).stdout
    buildkit = "buildx" in plugins or int(client.split(".")[0] or 0) < 23  # noqa: PLR2004 -- see look()
    root = info.get("DockerRootDir", "")
    store = root if os.access(root, os.R_OK) else ""
    rootless = "name=rootless" in (info.get("SecurityOptions") or [])
    return Engine("docker", program, info["ServerVersion"], store, buildkit=buildkit, rootless=rootless)


def adaptations(engine: Engine) -> list[Engine]:
    """Return ``engine`` as it is, then with each set of flags that awkward machines need, mildest first.

    crun refuses hybrid cgroups, where runc works. Without CAP_SYS_RESOURCE podman cannot raise limits to its
    defaults (``setrlimit RLIMIT_NPROC: Operation not permitted``): it is asked for no more than we have.
    """
    free = replace(engine, bounded=False)
    if not engine.podman:
        return [engine, free]
    limits: list[str] = []
    for name, number in LIMITS:
        hard = resource.getrlimit(number)[1]
        # podman itself lowers nproc to 32768 and nofile's default differs by version; 16384 is below all of them.
        value = 16384 if hard == resource.RLIM_INFINITY else min(hard, 16384)
        limits += ["--ulimit", f"{name}={value}:{value}"]
    runc = ("--runtime", "runc") if shutil.which("runc") else ()
    tries = [((), ()), ((), tuple(limits)), (runc, ()), (runc, tuple(limits))]
    return [
        replace(each, flags=flags, limits=ulimits) for each in (engine, free) for flags, ulimits in dict.fromkeys(tries)
    ]


def adapt(engine: Engine) -> Engine:
    """Return ``engine`` with the flags that let it start a container; asked once a boot, then remembered.

    Raises EngineBroken when none does.
    """
    known = remembered(engine.name)
    if known and replace(known, flags=engine.flags, limits=engine.limits, bounded=engine.bounded) == engine:
        return known
    proven = prove(engine)
    record = {"circumstances": _circumstances(engine.name), "engine": asdict(proven)}
    write_json(BUILD / f"engine-{engine.name}.json", record)
    return proven


def remembered(name: Name) -> Engine | None:
    """Return the engine that was proven here in the same circumstances, or None."""
    try:
        known = read_json(BUILD / f"engine-{name}.json")
        if known["circumstances"] != _circumstances(name):
            return None
        said = known["engine"]
        return Engine(**{**said, "flags": tuple(said["flags"]), "limits": tuple(said["limits"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _circumstances(name: Name) -> list[str]:
    """Return what a proof depends on: this boot, our limits, the programs called ``name``, and what steers them."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    programs = [f"{program} {Path(program).stat().st_mtime_ns}" for program in _programs(name)]
    steering = [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith(STEERING)]
    limits = [str(resource.getrlimit(number)) for _, number in LIMITS]
    return [boot.read_text().strip() if boot.exists() else "", *limits, *programs, *steering]


def prove(engine: Engine) -> Engine:
    """Start a container with the default network; return ``engine`` with the flags that took. Raises EngineBroken."""
    _make_proof_image(engine)
    done = None
    for attempt in adaptations(engine):
        argv = attempt.run(attempt.local(PROOF_IMAGE), name=f"opencode-server-proof-{os.getpid()}", keep=False)
        try:
            done = attempt.ask(argv, timeout=ASK_SECONDS)
        except subprocess.TimeoutExpired:
            done = process.Completed(tuple(argv), 1, "", f"nothing had started after {ASK_SECONDS:g} s", ASK_SECONDS)
        if done.ok:
            return attempt
        attempt.ask(attempt.remove_container(f"opencode-server-proof-{os.getpid()}"))
    said = done.said if done else ""
    raise EngineBroken(f"{engine.program} answers but cannot start a container", _remedy(said), said)


def describe(engine: Engine) -> str:
    """Return the engine and what was adapted, in words."""
    adapted = " ".join(
        (*engine.flags, *engine.limits, *(() if engine.bounded else ("no bounds on memory or processes",)))
    )
    builder = "" if engine.podman else ", BuildKit" if engine.buildkit else ", legacy builder"
    return f"{engine.name} {engine.version} ({engine.program}{builder})" + (f", with {adapted}" if adapted else "")


def _remedy(said: str) -> str:
    hints = {
        "netavark": "Install netavark and aardvark-dns: podman needs them for networks.",
        "aardvark": "Install netavark and aardvark-dns: podman needs them for networks.",
        "CNI": "Install containernetworking-plugins: this podman needs them for networks.",
        "newuidmap": "Install uidmap, and give this user a range in /etc/subuid and /etc/subgid.",
        "cgroup": "Install runc: crun refuses this machine's cgroups.",
    }
    return next(
        (hint for word, hint in hints.items() if word in said), "inv doctor says more; or use the other engine."
    )


def _make_proof_image(engine: Engine) -> None:
    """Import an image of one program that exits with 0, so that the proof needs no registry."""
    if engine.image(engine.local(PROOF_IMAGE)):
        return
    with tempfile.TemporaryDirectory() as scratch:
        tar = Path(scratch) / "proof.tar"
        program = exit_program(platform.machine())
        with tarfile.open(tar, "w") as archive:
            member = tarfile.TarInfo("exit0")
            member.size, member.mode = len(program), 0o755
            archive.addfile(member, BytesIO(program))
        done = engine.ask(engine.import_(tar, PROOF_IMAGE, ['CMD ["/exit0"]']), timeout=60)
    if not done.ok:
        raise EngineBroken(f"{engine.program} answers but cannot import an image", _remedy(done.said), done.said)


def exit_program(machine: str) -> bytes:
    """Return a static ELF program for x86_64 or aarch64 whose whole work is ``exit(0)``."""
    number, code = {
        "x86_64": (62, b"\x31\xff\xb8\x3c\x00\x00\x00\x0f\x05"),  # xor edi,edi; mov eax,60; syscall
        "aarch64": (183, b"\x00\x00\x80\xd2\xa8\x0b\x80\xd2\x01\x00\x00\xd4"),  # mov x0,0; mov x8,93; svc 0
    }["aarch64" if machine in {"aarch64", "arm64"} else "x86_64"]
    base, headers = 0x400000, 64 + 56
    size = headers + len(code)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    elf = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, number, 1, base + headers, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    return elf + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000) + code
