"""Which engine works on this machine, and which flags it needs here."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path

from pipeline.core import process
from pipeline.core.errors import EngineBroken, NoEngine
from pipeline.core.settings import BUILD, Settings
from pipeline.core.state import read_json, write_json
from pipeline.engines.commands import BOUNDS, Name
from pipeline.engines.engine import ASK_SECONDS, Engine

PROOF_IMAGE = "opencode-server-proof:1"

STEERING = ("BUILDAH", "CONTAINER", "DOCKER", "XDG_", "HOME")
"""Prefixes of the variables that select an engine's service and its store."""

LIMITS = (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC))

PODMAN_INFO = (
    "{{.Version.Version}} {{.Host.ServiceIsRemote}} "
    "{{.Host.Security.Rootless}} {{.Store.GraphDriverName}} {{.Store.GraphRoot}}"
)

HINTS = {
    "nftables": "Install nftables, which netavark needs for networks.",
    "/dev/net/tun": "Let this user open it, which rootless networks need: chmod 0666 /dev/net/tun.",
    "netavark": "Install netavark and aardvark-dns, which podman needs for networks.",
    "aardvark": "Install netavark and aardvark-dns, which podman needs for networks.",
    "CNI": "Install containernetworking-plugins, which this podman needs for networks.",
    "newuidmap": "Install uidmap and give this user a range in /etc/subuid and /etc/subgid.",
    "pids.max": "Use podman as root: this machine delegates no cgroups to users.",
    "cgroup": "Install runc: crun does not support this machine's cgroups.",
}
"""What helps, by a word of the engine's error output."""


def find(setting: str = "auto", platform: str = "") -> Engine:
    """Return the engine that ``setting`` (auto, podman or docker) selects, with the flags it needs.

    It builds for ``platform``; empty is this machine's own. Raises NoEngine when none answers,
    EngineBroken when one answers but cannot start a container.
    """
    names: list[Name] = ["podman", "docker"]
    reasons: list[str] = []
    broken: EngineBroken | None = None
    for name in names:
        if setting not in {"auto", name}:
            continue
        try:
            engine = remembered(name) or prove(answering(name))
        except NoEngine as error:
            reasons.append(error.what)
        except EngineBroken as error:
            broken = broken or error
        else:
            return replace(engine, platform=platform)
    if broken:
        raise broken
    raise NoEngine(
        "; ".join(reasons), "Install Podman with: inv setup. Or start the daemon of docker."
    )


def of(settings: Settings) -> Engine:
    """Return the engine that the settings select. Raises NoEngine, EngineBroken.

    Use this rather than ``find``: it takes the platform of the settings too.
    """
    return find(settings.engine, settings.platform)


def answering(name: Name) -> Engine:
    """Return the program ``name`` on PATH that answers. Raises NoEngine with the reason of each.

    Of two docker clients the one with BuildKit is taken: since docker 23.0 it needs the plugin
    buildx, which distributions package separately.
    """
    engines: list[Engine] = []
    reasons = []
    for program in _programs(name):
        try:
            engines.append(_podman(program) if name == "podman" else _docker(program))
        except subprocess.TimeoutExpired:
            reasons.append(f"{program}: no answer within {ASK_SECONDS:g} s")
        except ConnectionError as error:
            reasons.append(f"{program}: {error}")
        except (AttributeError, KeyError, TypeError, ValueError):
            reasons.append(f"{program}: the output of `info` is not that of {name}")
    for engine in engines:
        if engine.buildkit:
            return engine
    if engines:
        return engines[0]
    raise NoEngine("; ".join(reasons) or f"{name} is not installed", "Install it: inv setup.")


def _programs(name: str) -> list[str]:
    """Return each program of this name on PATH, once.

    A machine may have several, for example docker's own package and the distribution's.
    """
    found: dict[Path, str] = {}
    for directory in os.get_exec_path():
        if program := shutil.which(name, path=directory):
            found.setdefault(Path(program).resolve(), program)
    return list(found.values())


def _podman(program: str) -> Engine:
    """Return a podman that answers.

    Raises ConnectionError with the reason; ValueError for other output.
    """
    done = process.run([program, "info", "--format", PODMAN_INFO], timeout=ASK_SECONDS)
    if not done.ok:
        raise ConnectionError([f"exit code {done.code}", *done.output.splitlines()][-1])
    version, remote, rootless, driver, store = done.stdout.strip().split(maxsplit=4)
    return Engine(
        "podman",
        program,
        version,
        store=store if remote == "false" else "",
        rootless=rootless == "true",
        vfs=driver == "vfs",
    )


def _docker(program: str) -> Engine:
    """Return a docker whose daemon answers. Raises as ``_podman``.

    A client without a daemon prints a description too, without ServerVersion.
    """
    done = process.run([program, "info", "--format", "{{json .}}"], timeout=ASK_SECONDS)
    info = json.loads(done.stdout)
    if "host" in info or "BuildahVersion" in info:
        raise ConnectionError("this is podman under docker's name: use --engine podman")
    if not info.get("ServerVersion"):
        errors = info.get("ServerErrors") or done.output.splitlines()
        raise ConnectionError(["no answer", *errors][-1])
    argv = [program, "version", "--format", "{{.Client.Version}}"]
    version = process.run(argv, timeout=ASK_SECONDS).stdout.partition(".")[0]
    client = info["ClientInfo"]
    plugins = [plugin["Name"] for plugin in client.get("Plugins") or []]
    root = info.get("DockerRootDir", "")
    return Engine(
        "docker",
        program,
        info["ServerVersion"],
        store=root if os.access(root, os.R_OK) else "",
        buildkit="buildx" in plugins or int(version) < 23,  # noqa: PLR2004 -- see answering()
        rootless="name=rootless" in (info.get("SecurityOptions") or []),
        builder=client.get("Context") or "default",  # buildx has one of each context's name
        containerd="io.containerd.snapshotter.v1" in str(info.get("DriverStatus")),
    )


def adaptations(engine: Engine) -> Iterator[Engine]:
    """Yield ``engine`` as it is, then with each set of flags that some machines need.

    crun does not support hybrid cgroups, runc does. Without CAP_SYS_RESOURCE podman cannot raise
    its limits (``setrlimit RLIMIT_NPROC: Operation not permitted``), so lower ones are set.
    """
    limits: list[str] = []
    for name, number in LIMITS:
        # podman's own defaults differ by version; 16384 is below all of them.
        hard = resource.getrlimit(number)[1]
        value = 16384 if hard == resource.RLIM_INFINITY else min(hard, 16384)
        limits += ["--ulimit", f"{name}={value}:{value}"]
    for bounded in (True, False):
        yield replace(engine, bounded=bounded)
        if not engine.podman:
            continue
        yield replace(engine, bounded=bounded, limits=tuple(limits))
        if shutil.which("runc"):
            runc = replace(engine, bounded=bounded, flags=("--runtime", "runc"))
            yield runc
            yield replace(runc, limits=tuple(limits))


def remembered(name: Name) -> Engine | None:
    """Return the engine that ``prove`` recorded, if nothing it depends on has changed since.

    This saves about a second for each task: ``podman info`` and the start of a container.
    """
    record = read_json(BUILD / f"engine-{name}.json")
    if record.get("circumstances") != _circumstances(name):
        return None
    fields = record["engine"]
    for name_of_list in ("flags", "limits"):  # JSON has no tuples
        fields[name_of_list] = tuple(fields[name_of_list])
    engine = Engine(**fields)
    # podman on this machine has no daemon that could have stopped.
    local = engine.podman and engine.store
    return engine if local or engine.answers() else None


def _circumstances(name: Name) -> list[str]:
    """Return what a proof depends on: the boot, our limits, the programs and their variables.

    A reboot may change cgroups, an update the program, and a variable the store.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    facts = [f"2 {boot.read_text() if boot.exists() else ''}"]
    facts += [str(resource.getrlimit(number)) for _, number in LIMITS]
    facts += [f"{program} {Path(program).stat().st_mtime_ns}" for program in _programs(name)]
    variables = sorted(os.environ.items())
    return facts + [f"{key}={value}" for key, value in variables if key.startswith(STEERING)]


def prove(engine: Engine) -> Engine:
    """Run a container and a build; return and record ``engine`` with the flags that worked.

    Raises EngineBroken.
    """
    _import_proof_image(engine)
    output = ""
    for attempt in adaptations(engine):
        output = _fault(attempt, f"opencode-server-proof-{os.getpid()}")
        if not output:
            record = {"circumstances": _circumstances(engine.name), "engine": asdict(attempt)}
            write_json(BUILD / f"engine-{engine.name}.json", record)
            return attempt
    raise _broken(f"{engine.program} cannot start a container", output)


def _fault(engine: Engine, name: str) -> str:
    """Return why the engine cannot run, limit or build a container; nothing if it can."""
    image = engine.local(PROOF_IMAGE)
    try:
        done = engine.ask(engine.run(image, name=name), timeout=ASK_SECONDS)
        # Some engines ignore the limits with a warning.
        template = "{{.HostConfig.Memory}} {{.HostConfig.PidsLimit}}"
        limits = engine.ask(engine.inspect(name, template)).stdout.split()
        if done.ok and engine.bounded and limits != [str(4 << 30), BOUNDS["pids_limit"]]:
            return f"{engine.name} ignores limits: {limits}"
        if done.ok:
            # podman 5 without CAP_SYS_RESOURCE runs containers, and builds only with limits.
            with tempfile.TemporaryDirectory() as scratch:
                file = Path(scratch) / "Containerfile"
                file.write_text(f'FROM {image}\nRUN ["/exit0"]\n')
                argv = engine.build(Path(scratch), tag=name, containerfile=file, cache=False)
                done = engine.ask(argv, timeout=ASK_SECONDS)
            engine.ask(engine.remove_image(engine.local(name)))
    except subprocess.TimeoutExpired:
        return f"the container did not start within {ASK_SECONDS:g} s"
    finally:
        engine.ask(engine.remove_container(name))
    return "" if done.ok else done.output or f"exit code {done.code}"


def describe(engine: Engine) -> str:
    """Return the engine, its builder and its flags for people.

    podman 4.3.1 (/usr/bin/podman), with --ulimit nofile=16384:16384
    """
    flags = [*engine.flags, *engine.limits]
    if not engine.bounded:
        flags.append("no limits on memory or processes")
    if engine.vfs:
        flags.append("vfs, which copies every layer")
    for name, value in engine.env.items():
        if os.environ.get(name) not in {None, "", value}:
            flags.append(f"not your {name}")
    builder = ""
    if not engine.podman:
        builder = ", BuildKit" if engine.buildkit else ", legacy builder"
    adapted = f", with {' '.join(flags)}" if flags else ""
    return f"{engine.name} {engine.version} ({engine.program}{builder}){adapted}"


def _broken(what: str, output: str) -> EngineBroken:
    """Return the failure with the hint that fits the engine's error output.

    The message ends with the last line of that output; all of it is in ``details``.
    """
    last = output.strip().splitlines()[-1:]
    for word, hint in HINTS.items():
        if word in output:
            return EngineBroken(": ".join([what, *last]), hint, output)
    return EngineBroken(": ".join([what, *last]), "Use the other engine: --engine.", output)


def _import_proof_image(engine: Engine) -> None:
    """Import an image with one program that exits with 0, so that a proof needs no registry.

    The image is a few hundred bytes and stays, as ``opencode-server-proof``.
    """
    if engine.image(engine.local(PROOF_IMAGE)):
        return
    program = exit_program(platform.machine())
    member = tarfile.TarInfo("exit0")
    member.size = len(program)
    member.mode = 0o755
    with tempfile.TemporaryDirectory() as scratch:
        tar = Path(scratch) / "proof.tar"
        with tarfile.open(tar, "w") as archive:
            archive.addfile(member, BytesIO(program))
        done = engine.ask(engine.import_(tar, PROOF_IMAGE, ['CMD ["/exit0"]']), timeout=60)
    if not done.ok:
        raise _broken(f"{engine.program} cannot import an image", done.output)


def exit_program(machine: str) -> bytes:
    """Return a static ELF program for x86_64 or aarch64 that exits with 0.

    One header, one loadable segment and one system call: exit(0). The file format is in elf(5).
    """
    arm = machine in {"aarch64", "arm64"}
    # xor edi,edi; mov eax,60; syscall -- or mov x0,0; mov x8,93; svc 0
    code = bytes.fromhex("000080d2a80b80d2010000d4" if arm else "31ffb83c0000000f05")
    base, headers = 0x400000, 64 + 56
    size = headers + len(code)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(b"\x7fELF\x02\x01\x01".ljust(16, b"\0"), 2, 183 if arm else 62, 1),
        *(base + headers, 64, 0, 0, 64, 56, 1, 64, 0, 0),
    )
    return header + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000) + code
