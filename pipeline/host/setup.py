"""``inv setup``: installs an engine and the programs of the tests on Debian and Ubuntu."""

from __future__ import annotations

import os
import shlex
import shutil
from typing import Any

from pipeline.core import process
from pipeline.core.console import log, ok, warn
from pipeline.core.errors import EngineBroken, NoEngine, SetupFailed
from pipeline.engines import detect
from pipeline.inputs import base

FOR_BASE = ("mmdebstrap", "debian-archive-keyring")
"""The packages that build the base image where no registry answers."""

PACKAGES = (
    "podman netavark aardvark-dns iptables nftables catatonit runc uidmap slirp4netns passt"
    " fuse-overlayfs mmdebstrap debian-archive-keyring ca-certificates git"
)
"""The packages of an engine on Debian 12, Ubuntu 24.04 and newer.

netavark makes podman's networks; it calls iptables or nft and depends on neither package.
catatonit is ``podman run --init``. runc is for hybrid cgroups, which crun does not support.
uidmap to fuse-overlayfs are for rootless podman; passt is for podman 5.
"""

FOR_TESTS = {
    # Newer releases package the client by itself; elsewhere the pattern matches no package.
    "dockerd": "docker.io ?name(^docker-cli$)",
    "docker-compose": "docker-compose",
    "docker-registry": "docker-registry",
    "iptables": "iptables",
    "ip": "iproute2",
    "openssl": "openssl",
    "sshd": "openssh-server",
    "rclone": "rclone",
    "redis-cli": "redis-tools",
    "cron": "cron",
    "faketime": "faketime",
    "htpasswd": "apache2-utils",
    "caddy": "caddy",
    "systemd-analyze": "systemd",
}
"""The programs of the tests, and the packages that contain them."""

SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")
"""Where daemons are installed; the PATH of Debian's users lacks these directories."""

INSTALL = (
    "env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends --no-upgrade"
    # A new Ubuntu machine updates itself at first and holds dpkg's lock for some minutes.
    " --option DPkg::Lock::Timeout=300"
)


def setup(
    setting: str,
    *,
    tests: bool = False,
    dry_run: bool = False,
) -> None:
    """Print which engine works; install podman if none does. ``tests``: also what the tests need.

    Raises SetupFailed, and EngineBroken when the installed engine cannot start a container.
    """
    try:
        engine = detect.find(setting)
        ok(f"{detect.describe(engine)} works")
    except (NoEngine, EngineBroken) as error:
        engine = None
        log(f"no engine works: {error.what}\n{error.details}".rstrip())
        if setting == "docker":
            remedy = "Start its daemon, or use podman: inv setup --engine auto"
            raise SetupFailed(f"docker does not work: {error.what}", remedy) from error
    packages = missing(engine=engine is not None, tests=tests)
    if engine and not shutil.which(FOR_BASE[0]) and not base.within_reach(engine):
        log("no registry answers, so the base image will be built on this machine")
        packages += FOR_BASE
    if not packages:
        return
    install(packages, dry_run=dry_run)
    if not engine and not dry_run:
        ok(f"{detect.describe(detect.find(setting))} has started a container")


def missing(
    *,
    engine: bool,
    tests: bool,
) -> list[str]:
    """Return the packages to install; ``engine`` says whether one works already.

    Programs count as installed also in the directories of daemons, see SBIN.
    """
    path = os.pathsep.join((*os.get_exec_path(), *SBIN))
    programs = {"git": "git"}
    if tests:
        programs |= FOR_TESTS
    packages = [] if engine else PACKAGES.split()
    for program, names in programs.items():
        if not shutil.which(program, path=path):
            packages += names.split()
    return list(dict.fromkeys(packages))


def install(
    packages: list[str],
    *,
    dry_run: bool,
) -> None:
    """Install packages with apt-get, as root or with sudo. Raises SetupFailed.

    ``dry_run`` prints the command only.
    """
    if not shutil.which("apt-get"):
        raise SetupFailed(
            "inv setup installs packages with apt-get only",
            "Install podman 4.3 or newer and git with your package manager, then: inv doctor",
        )
    root = os.geteuid() == 0
    allowed = root or shutil.which("sudo") is not None
    prefix = ["sudo"] if allowed and not root else []
    update = [*prefix, "apt-get", "update"]
    argv = [*prefix, *INSTALL.split(), *packages]
    command = f"{shlex.join(update)} && {shlex.join(argv)}"
    log(f"installing {', '.join(packages)}:\n  {command}")
    if dry_run:
        return
    if not allowed:
        raise SetupFailed(
            "root is needed, and sudo is not installed",
            f"As root: {command}",
        )
    # sudo gets the terminal, since it may ask for a password.
    options: dict[str, Any] = {"terminal": True} if prefix else {"on_line": log, "tail": 15}
    if not process.run(update, **options).ok:
        warn("apt-get update failed; the package lists may be outdated")
    done = process.run(argv, **options)
    if not done.ok:
        raise SetupFailed(
            f"apt-get install exited with {done.code}",
            f"Run it by hand: {shlex.join(argv)}",
            done.output,
        )
