"""What set-up installs on this machine: a container engine with what it needs, and the tools that the tests need."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import sys
import time
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pipeline import process
from pipeline.errors import EngineBroken, NoEngine, SetupFailed, ToolMissing
from pipeline.report import ok, say, warn
from pipeline.settings import ROOT

Manager = Literal["apt-get", "dnf", "brew"]

PACKAGES: Mapping[Manager, str] = {
    "apt-get": "podman netavark|containernetworking-plugins aardvark-dns iptables nftables catatonit runc uidmap"
    " slirp4netns passt fuse-overlayfs mmdebstrap debian-archive-keyring ca-certificates git",
    "dnf": "podman netavark|containernetworking-plugins aardvark-dns iptables-nft nftables catatonit runc"
    " shadow-utils-subid slirp4netns passt fuse-overlayfs mmdebstrap debian-keyring ca-certificates git",
    "brew": "podman git",
}
"""For an engine: of each word the first name that the manager has is installed, and nothing when it has none.

podman 3, as in Ubuntu 22.04, has CNI's plugins for networks and newer ones netavark, which calls iptables, or nft in
its newer versions, without depending on either. catatonit is ``podman run --init``; runc is for hybrid cgroups, which
crun refuses; the next four are podman without root (passt is for podman 5); mmdebstrap and Debian's keys make the base
image where no registry answers.
"""

FOR_TESTS: Mapping[Manager, Mapping[str, str]] = {
    "apt-get": {
        "dockerd": "docker.io docker-cli",
        "docker-compose": "docker-compose",
        "docker-registry": "docker-registry",
        "iptables": "iptables",
        "ip": "iproute2",
        "openssl": "openssl",
        "rclone": "rclone",
        "redis-cli": "redis-tools",
        "cron": "cron",
        "faketime": "faketime",
        "htpasswd": "apache2-utils",
        "systemd-analyze": "systemd",
    },
    "dnf": {
        "dockerd": "moby-engine docker-cli",
        "docker-compose": "docker-compose",
        "registry": "docker-distribution",
        "iptables": "iptables-nft",
        "ip": "iproute",
        "openssl": "openssl",
        "rclone": "rclone",
        "redis-cli": "redis",
        "crond": "cronie",
        "faketime": "libfaketime",
        "htpasswd": "httpd-tools",
        "systemd-analyze": "systemd",
    },
    "brew": {},
}
"""For the tests: a program, and what brings it."""

FOR_BASE = ("mmdebstrap", "debian-archive-keyring", "debian-keyring")
"""Of the packages for an engine, those that make the base image where no registry answers."""

LISTS = Path("/var/lib/apt/lists")
SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")
"""Where daemons are, and where the PATH of Debian's users does not look."""


def setup(setting: str, *, tests: bool = False, dry_run: bool = False) -> None:
    """Say which engine answers; install podman when none does, then prove it. ``tests``: also what the tests need.

    Raises SetupFailed, and EngineBroken when what was installed cannot start a container.
    """
    from pipeline import base
    from pipeline import engine as engines

    try:
        found = engines.find(setting)
        ok(f"{engines.describe(found)} answers")
    except (NoEngine, EngineBroken) as error:
        found = None
        say(f"no engine: {error.what}")
        if setting == "docker":
            remedy = "Start its daemon, or leave the engine at auto: setup installs podman."
            raise SetupFailed(f"docker was asked for: {error.what}", remedy, error.details) from error
    manager = next((name for name in PACKAGES if shutil.which(name)), None)
    entries = lacking(manager, engine=found is not None, tests=tests)
    if found and not shutil.which("mmdebstrap") and not base.within_reach(found):
        say("no registry answers: the base image will have to be made here")
        entries += [entry for entry in PACKAGES[manager or "apt-get"].split() if entry in FOR_BASE]
    if not entries:
        return
    _install(manager, entries, dry_run=dry_run)
    if not (found or dry_run):
        ok(f"{engines.describe(engines.find(setting))} has started a container")


def lacking(manager: Manager | None, *, engine: bool, tests: bool) -> list[str]:
    """Return the entries to install when an ``engine`` answers, or not. Raises SetupFailed when nobody could."""
    path = os.pathsep.join((*os.get_exec_path(), *SBIN))
    known = manager or "apt-get"
    entries = [] if engine else PACKAGES[known].split()
    programs = {"git": "git"} | (dict(FOR_TESTS[known]) if tests else {})
    for program, names in programs.items():
        entries += [] if shutil.which(program, path=path) else names.split()
    if entries and not manager:
        raise SetupFailed(
            "none of apt-get, dnf and brew is here", f"Install by hand what your system calls: {', '.join(entries)}."
        )
    return list(dict.fromkeys(entries))


def choose(entries: Iterable[str], available: Collection[str]) -> list[str]:
    """Return of each entry the first name that is ``available``; of all the first when nothing is known to be."""
    if not available:
        return [entry.split("|")[0] for entry in entries]
    found = (next((name for name in entry.split("|") if name in available), None) for entry in entries)
    return [name for name in found if name]


def install_argv(manager: Manager, packages: Sequence[str], *, root: bool, sudo: bool) -> list[list[str]]:
    """Return the commands that install ``packages``; with neither root nor sudo, as root would type them."""
    if manager == "brew":
        return [["brew", "install", *packages]]  # brew refuses root
    prefix = ["sudo"] if sudo and not root else []
    if manager == "dnf":
        return [[*prefix, "dnf", "install", "--assumeyes", "--setopt=install_weak_deps=False", *packages]]
    # A fresh Ubuntu updates itself after its first start, and holds dpkg's lock for some minutes.
    words = ["install", "--yes", "--no-install-recommends", "--no-upgrade", "--option", "DPkg::Lock::Timeout=300"]
    return [[*prefix, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", *words, *packages]]


def refresh_argv(manager: Manager, *, root: bool, sudo: bool, lists: Path) -> list[list[str]]:
    """Return the command that renews apt's package lists when they are missing or a day old; other managers do it."""
    if manager != "apt-get":
        return []
    if any(lists.glob("*_Packages*")):
        renewed = max(path.stat().st_mtime for path in (lists, lists / "partial") if path.exists())
        if time.time() - renewed < 24 * 60 * 60:
            return []
    return [[*(["sudo"] if sudo and not root else []), "apt-get", "update"]]


def machine_argv(machines: str) -> list[list[str]]:
    """Return what starts podman's virtual machine, which macOS needs; ``machines`` is what podman lists already."""
    return [*([] if machines.strip() else [["podman", "machine", "init"]]), ["podman", "machine", "start"]]


def _install(manager: Manager | None, entries: list[str], *, dry_run: bool) -> None:
    assert manager  # noqa: S101 -- lacking() raised otherwise
    root, sudo = os.geteuid() == 0, shutil.which("sudo") is not None
    refresh = refresh_argv(manager, root=root, sudo=sudo, lists=LISTS)
    may = root or sudo or manager == "brew"
    if may and not dry_run:
        for argv in refresh:
            try:
                _run(argv)
            except SetupFailed:
                warn("apt-get update failed; trying with the lists that are here")
        refresh = []
    packages = choose(entries, _available(manager, entries))
    if "podman" in entries and "podman" not in packages:
        raise SetupFailed(f"{manager} has no podman", "Enable the repository that has it (on Ubuntu: universe).")
    argvs = [*refresh, *install_argv(manager, packages, root=root, sudo=sudo)]
    command = " && ".join(map(shlex.join, argvs))
    say(f"installing {', '.join(packages)}:\n  {command}")
    if dry_run:
        return
    if not may:
        raise SetupFailed("installing needs root, and there is no sudo", f"Run this as root, then inv setup: {command}")
    for argv in argvs:
        _run(argv)
    if manager == "brew" and "podman" in packages:
        for argv in machine_argv(process.run(["podman", "machine", "list", "--quiet"]).stdout):
            _run(argv)


def _available(manager: Manager, entries: Iterable[str]) -> set[str]:
    """Return which names of ``entries`` the manager can install; nothing where it is not asked."""
    names = [name for entry in entries for name in entry.split("|")]
    if manager == "apt-get":
        # A candidate of (none) is a name that others only refer to.
        said = process.run(["apt-cache", "policy", *names], env={"LC_ALL": "C"}).stdout
        return set(re.findall(r"^(\S+):\n.*\n  Candidate: (?!\(none\))", said, re.MULTILINE))
    if manager == "dnf":
        return set(process.run(["dnf", "--quiet", "repoquery", "--queryformat", "%{name}\n", *names]).stdout.split())
    return set()


def _run(argv: list[str]) -> None:
    """Run a command with its output shown. Raises SetupFailed when it fails."""
    asks = argv[0] == "sudo"  # for a password, on the terminal
    done = process.run(argv, terminal=True) if asks else process.run(argv, on_line=say, tail=15)
    if not done.ok:
        raise SetupFailed(f"{argv[0]} ended with {done.code}", f"Try it by hand: {shlex.join(argv)}", done.said)


def missing_tools(project: Path = ROOT / "pyproject.toml") -> list[str]:
    """Return the development tools of ``pyproject.toml`` that this interpreter does not have."""
    wanted = tomllib.loads(project.read_text())["project"]["optional-dependencies"]["dev"]
    missing = []
    for requirement in wanted:
        name = re.split(r"[^\w.-]", requirement)[0]
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return missing


def ensure_dev_tools(venv: Path = ROOT / ".venv") -> None:
    """Install ``locks/dev.txt`` into our own ``.venv`` when a tool is missing from it.

    Raises ToolMissing when this interpreter is not ours to change, SetupFailed when the tools cannot be had.
    """
    missing = missing_tools()
    if not missing:
        return
    if Path(sys.prefix).resolve() != venv.resolve():
        raise ToolMissing(
            f"{', '.join(missing)} not in {sys.prefix}", "Use ./inv, or: pip install --require-hashes -r locks/dev.txt"
        )
    from filelock import FileLock

    lock = ROOT / "locks" / "dev.txt"
    say(f"installing the development tools of locks/dev.txt into {venv.name}")
    with FileLock(f"{venv}.lock"):  # the one that ./inv takes
        done = process.run(dev_argv(lock, pip=importlib.util.find_spec("pip") is not None), env=tool_env())
        if not done.ok:
            raise SetupFailed("the development tools could not be installed", "See what it said.", done.said)
        draft = venv / "made-from.part"
        shutil.copyfile(lock, draft)
        draft.replace(venv / "made-from.txt")


def dev_argv(lock: Path, *, pip: bool) -> list[str]:
    """Return what installs ``lock`` into this interpreter: its ``pip``, or uv, which makes a .venv without one."""
    argv = [sys.executable, "-m", "pip", "install"] if pip else ["uv", "pip", "install", "--python", sys.executable]
    return [*argv, "--quiet", "--require-hashes", "-r", str(lock)]


def tool_env() -> dict[str, str]:
    """As in ./inv: nobody's own constraints, which have no hashes; and uv is told what pip reads."""
    env = {"UV_CONSTRAINT": "", "PIP_CONSTRAINT": os.devnull, "PIP_USER": "0"}
    told = {"UV_DEFAULT_INDEX": "PIP_INDEX_URL", "SSL_CERT_FILE": "PIP_CERT"}
    return env | {uv: os.environ[pip] for uv, pip in told.items() if os.environ.get(pip) and not os.environ.get(uv)}
