"""Fetch OpenAgents into ``vendor/OpenAgents``, whole or not at all, and report what is there.

A fetch works in ``vendor/.incoming-*``. One rename then puts tree and record into place together:
whenever the process is killed, a reader sees the old ones or the new ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.core import console
from pipeline.core.errors import (
    DiskFull,
    GitHostUnreachable,
    LocalEdits,
    LockBroken,
    NoSuchRef,
    NothingFetched,
    NotOpenAgents,
    ToolMissing,
    VendorUnusable,
)
from pipeline.core.settings import ROOT, Settings
from pipeline.inputs import git

VENDOR = ROOT / "vendor"
STARTER = VENDOR / "starter"
PIN = ROOT / "locks" / "openagents.json"
NAME, RECORD = "OpenAgents", ".fetched.json"

STARTER_NOTICE = """OpenAgents could not be fetched: {}
Using vendor/starter, a small replacement, instead. Its images are labelled as such
and do not replace a `latest` that was built with OpenAgents.
To get OpenAgents later, or from a clone: ./inv fetch, or ./inv fetch --url CLONE"""


class Record(BaseModel):
    """What ``vendor/OpenAgents`` holds.

    ``commit`` is a full hash, or ``starter``. ``fetched`` is UTC in ISO 8601, and ``tree`` the
    result of ``tree_hash`` at that time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["openagents", "starter"]
    url: str
    ref: str
    commit: str
    fetched: str = ""
    tree: str = ""

    def __str__(self) -> str:
        """Return the name for messages."""
        if self.kind == "starter":
            return "the starter"
        return f"OpenAgents {self.commit[:7]} ({self.ref}) of {self.url}"


@dataclass(frozen=True)
class Wanted:
    """What to fetch. ``commit`` is empty until the host was asked.

    ``other`` is true for the pinned commit of another repository, which may not have it.
    """

    url: str
    ref: str
    commit: str = ""
    other: bool = False

    @property
    def record(self) -> Record:
        """The record of this source, without the credentials of its URL."""
        url = console.without_credentials(self.url)
        return Record(kind="openagents", url=url, ref=self.ref, commit=self.commit)


def read(vendor: Path = VENDOR) -> Record | None:
    """Return the record in ``vendor``; None if nothing was fetched.

    Raises NothingFetched if the tree is incomplete.
    """
    place = vendor / NAME
    if not place.is_dir() or not any(place.iterdir()):
        return None
    remedy = "Run: inv fetch"
    try:
        record = Record.model_validate_json((place / RECORD).read_bytes())
    except (OSError, ValidationError) as error:
        raise NothingFetched(f"{place} has no valid {RECORD}", remedy, str(error)) from error
    if not _has_agents(place):
        raise NothingFetched(f"{place} is incomplete: no agents in .opencode/", remedy)
    return record


def tree_hash(tree: Path) -> str:
    """Return the SHA-256 (hex) of the names, executable bits, links and contents, without .git."""
    lines = []
    for path in tree.rglob("*"):
        name = path.relative_to(tree)
        if name.parts[0] == ".git" or name.parts[0].startswith(".fetched."):
            continue
        if path.is_symlink():
            data = b"link " + os.fsencode(path.readlink())
        elif path.is_file():
            mode = b"x " if path.stat().st_mode & 0o100 else b"- "
            data = mode + path.read_bytes()
        else:
            continue
        lines.append(os.fsencode(f"{hashlib.sha256(data).hexdigest()} {name}"))
    return hashlib.sha256(b"\n".join(sorted(lines))).hexdigest()


def fetch(
    settings: Settings,
    *,
    ref: str = "",
    url: str = "",
    latest: bool = False,
    force: bool = False,
    starter: bool = True,
    dry_run: bool = False,
    vendor: Path = VENDOR,
) -> Record:
    """Bring ``vendor/OpenAgents`` to the pinned commit, or to ``url``, ``ref`` or ``latest``.

    With ``starter``, vendor/starter is used when the host does not answer and OpenAgents was never
    fetched. ``force`` discards local edits. ``dry_run`` changes nothing; its record has no
    ``tree`` and no ``fetched``.

    Raises GitHostUnreachable, NoSuchRepository, NoSuchRef, NotOpenAgents, LocalEdits,
    VendorUnusable, DiskFull, ToolMissing or LockBroken. The tree is unchanged then.
    """
    want = wanted(settings, ref=ref, url=url, latest=latest)
    _refuse_unusable(vendor)
    # Before the lock too: with nothing to do, a read-only vendor/ is fine.
    if kept := _kept(want, vendor, force=force):
        return kept
    if not shutil.which("git"):
        raise ToolMissing("git is not installed", "Run: ./inv setup")
    if dry_run:
        want = resolved(settings, want)
        console.log(f"In {vendor.name}/{NAME}: {_whole(vendor) or 'nothing complete'}")
        console.log(f"Would fetch {want.record}")
        return want.record
    with _locked(vendor) as incoming:
        tree = incoming / NAME
        try:
            record = _kept_or_cloned(settings, want, vendor, tree, force=force)
        except GitHostUnreachable as failure:
            current = _whole(vendor)
            if not starter or (current and current.kind == "openagents"):
                raise
            console.warn(STARTER_NOTICE.format(failure.what))
            version = (STARTER / "VERSION").read_text().strip()
            if current and current.ref == version:
                return current
            record = _copy_starter(version, tree)
        if not (tree / RECORD).exists():
            return record
        if not force:
            _refuse_edits(vendor / NAME)
        swap(tree, vendor / NAME)
    console.ok(f"{record} is in {vendor.name}/{NAME}")
    return record


def wanted(settings: Settings, *, ref: str = "", url: str = "", latest: bool = False) -> Wanted:
    """Return what the arguments name, else the settings, else the pin. Raises LockBroken."""
    try:
        pinned = Wanted(**json.loads(PIN.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        remedy = "Restore it: git checkout locks/openagents.json"
        raise LockBroken(f"{PIN} has no url, ref and commit", remedy, str(error)) from error
    url = address(url or settings.openagents.url or pinned.url)
    ref = ref or settings.openagents.ref
    if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", ref):
        return Wanted(url, ref, ref)
    if ref or latest:
        return Wanted(url, ref or pinned.ref)
    return replace(pinned, url=url, other=url != pinned.url)


def address(url: str) -> str:
    """Return ``url``, a path as a file URL: git ignores --depth and --filter for a plain path."""
    local = Path(url).expanduser()
    if "://" not in url and (local.exists() or ":" not in url):
        return local.resolve().as_uri()
    return url


def resolved(settings: Settings, want: Wanted) -> Wanted:
    """Return ``want`` with the commit that its branch or tag has now.

    Raises GitHostUnreachable, NoSuchRepository or NoSuchRef.
    """
    if want.commit:
        return want
    tag = f"refs/tags/{want.ref}"
    # ^{}: the commit of an annotated tag
    names = [f"refs/heads/{want.ref}", f"{tag}^{{}}", tag]
    if want.ref == "HEAD":
        names = ["HEAD"]
    output = git.run(settings, want.url, ["ls-remote", "--symref", "--", want.url, *names])
    if branch := re.match(r"ref: refs/heads/(.*)\tHEAD\n", output):
        want = replace(want, ref=branch[1])
    for name in names:
        if found := re.search(rf"^(\w+)\t{re.escape(name)}$", output, re.MULTILINE):
            return replace(want, commit=found[1])
    raise NoSuchRef(
        f"{want.record.url} has no branch or tag {want.ref}", "Set --ref to one that it has."
    )


def _whole(vendor: Path) -> Record | None:
    with contextlib.suppress(NothingFetched):
        return read(vendor)
    return None


def _kept(want: Wanted, vendor: Path, *, force: bool) -> Record | None:
    """Return the record of the current tree if it is what is wanted; None if there is work."""
    current = _whole(vendor)
    if current is None or current.commit != want.commit:
        return None
    if want.other and current.url != want.record.url:
        return None
    if tree_hash(vendor / NAME) == current.tree:
        console.ok(f"{current} is already there")
    elif force:
        return None
    else:
        console.warn(f"{current} is already there, with local edits. Discard them with --force.")
    return current


def _copy_starter(version: str, tree: Path) -> Record:
    shutil.rmtree(tree, ignore_errors=True)  # remains of the failed fetch
    shutil.copytree(STARTER, tree, symlinks=True)
    record = Record(kind="starter", url="vendor/starter", ref=version, commit="starter")
    return _sealed(tree, record)


def _kept_or_cloned(
    settings: Settings, want: Wanted, vendor: Path, tree: Path, *, force: bool
) -> Record:
    """Return the record of the current tree if it is ``want``; otherwise clone it into ``tree``.

    Of another repository without the pinned commit, the default branch is taken.
    """
    want = resolved(settings, want)
    if kept := _kept(want, vendor, force=force):
        return kept
    try:
        console.log(f"Fetching {want.record}")
        git.clone(settings, want.url, want.ref, want.commit, tree)
        if not _has_agents(tree):
            raise NotOpenAgents(
                f"{want.record} has no agents in .opencode/", "Check --url and --ref."
            )
        return _sealed(tree, want.record)
    except NoSuchRef:
        if not want.other:
            raise
    url = want.record.url
    console.log(f"{url} does not have the pinned {want.commit[:7]}: taking its default branch")
    shutil.rmtree(tree, ignore_errors=True)
    default = Wanted(want.url, "HEAD")
    return _kept_or_cloned(settings, default, vendor, tree, force=force)


def _refuse_unusable(vendor: Path) -> None:
    for path in (vendor, vendor / NAME):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise VendorUnusable(
                f"{path} is not a directory in this repository",
                "Move it away, then run: inv fetch. For a clone elsewhere: inv fetch --url CLONE",
            )


def _refuse_edits(place: Path) -> None:
    """Raise LocalEdits if replacing ``place`` would lose something that fetch did not put there."""
    if not place.is_dir() or not any(place.iterdir()):
        return
    current = _whole(place.parent)
    edited = tree_hash(place) != current.tree if current else _more_than_incomplete(place)
    own = [*place.glob(".git/refs/heads/*"), *place.glob(".git/refs/stash")]
    if edited or own:
        raise LocalEdits(
            f"{place} has local edits, branches or a stash",
            f"List them: git -C {place} status --ignored. Discard them: inv fetch --force",
        )


def _more_than_incomplete(place: Path) -> bool:
    """Whether a tree without agents or record has new or changed files, not only missing ones."""
    from git import Repo

    if not (place / ".git").is_dir():
        return True
    lines = Repo(place).git.status("--porcelain", "--ignored", "-z").split("\0")
    return any(line and not line.startswith((" D ", "!! .fetched.")) for line in lines)


def _has_agents(tree: Path) -> bool:
    folders = (tree / ".opencode" / "agent", tree / ".opencode" / "agents")
    return any(any(folder.rglob("*.md")) for folder in folders)


def _sealed(tree: Path, record: Record) -> Record:
    """Write ``record`` into ``tree``, with the time and the hash that shows later edits."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record = record.model_copy(update={"fetched": now, "tree": tree_hash(tree)})
    (tree / RECORD).write_text(record.model_dump_json(indent=2) + "\n")
    return record


def swap(tree: Path, place: Path) -> None:
    """Put ``tree`` at ``place``, in one step if possible; the old tree is then at ``tree``."""
    if place.exists():
        if exchange(tree, place):
            return
        place.rename(tree.with_name("old"))
    tree.rename(place)


def exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; False where the system or file system cannot."""
    at_fdcwd, rename_exchange = -100, 2  # from linux/fcntl.h and linux/fs.h
    try:
        rename = ctypes.CDLL(None).renameat2
    except AttributeError:  # glibc before 2.28
        return False
    return bool(rename(at_fdcwd, bytes(one), at_fdcwd, bytes(other), rename_exchange) == 0)


def _tidy(vendor: Path) -> None:
    """Undo a swap that ended between its two renames, and remove what fetches have left."""
    for incoming in vendor.glob(".incoming-*"):
        if (incoming / "old").exists() and not (vendor / NAME).exists():
            (incoming / "old").rename(vendor / NAME)
        shutil.rmtree(incoming, ignore_errors=True)


@contextlib.contextmanager
def _locked(vendor: Path) -> Iterator[Path]:
    """Hold the lock of ``vendor`` and yield an empty directory in it.

    Raises DiskFull or VendorUnusable for faults of its file system.
    """
    from filelock import FileLock, Timeout
    from git.exc import GitError

    try:
        vendor.mkdir(parents=True, exist_ok=True)
        lock = FileLock(vendor / ".lock")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            console.log("Another fetch is running: waiting for it.")
            held = lock.acquire()
        with held:
            _tidy(vendor)
            try:
                yield Path(tempfile.mkdtemp(prefix=".incoming-", dir=vendor))
            finally:
                _tidy(vendor)
    except (OSError, GitError) as error:
        if re.search(git.DISK_FULL, str(error)):
            remedy = "Free up space there, then run: inv fetch"
            raise DiskFull(f"no space left in {vendor}", remedy, str(error)) from error
        remedy = f"Make {vendor} writable for this user, then run: inv fetch"
        raise VendorUnusable(f"{vendor} cannot be written: {error}", remedy) from error
