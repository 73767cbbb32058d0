"""Fetch OpenAgents into ``vendor/OpenAgents``, whole or not at all, and say what is there.

Everything happens in ``vendor/.incoming-*``; one rename then puts tree and record into place together, so that a
reader sees the old ones or the new ones whenever we are killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import select
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import errors, report
from pipeline.errors import GitHostUnreachable, LocalEdits, NoSuchRef, NothingFetched, PipelineError, VendorUnusable
from pipeline.settings import ROOT, Settings

VENDOR = ROOT / "vendor"
STARTER = VENDOR / "starter"
PIN = ROOT / "locks" / "openagents.json"
NAME, RECORD, LISTING = "OpenAgents", ".fetched.json", ".fetched.tree"

_ASK_FOR_REF = "Give --ref a branch, a tag or a full commit of that repository."
_TRY_LATER = "Try again later, or give --url a mirror or a clone."
_MAKE_ROOM = "Make room on the disk that holds vendor/, then fetch again."
_NO_SINGLE_COMMITS = "unadvertised object|dumb http"
_FULL = "No space left|quota exceeded|Out of diskspace|unable to write"  # the last: git checkout's only words
_REFUSED = (
    "error: 40[134]|not found|not exist|not appear to be|not a git repository|not allowed|not exported|valid: is|"
    "could not read|Authentication failed|Permission denied|Host key|ownership|remote helper|not a git command"
)
# git has one exit code for every fault: its words, which GitPython asks for in English, are all there is to go by.
_WORDS: tuple[tuple[str, type[PipelineError], str], ...] = (
    (_FULL, errors.DiskFull, _MAKE_ROOM),
    ("from proxy|proxy CONNECT", GitHostUnreachable, "Ask for access through the proxy, or give --url a mirror."),
    ("certificate", GitHostUnreachable, "Where TLS is intercepted, name its authority with --ca FILE."),
    ("not our ref|find remote ref|" + _NO_SINGLE_COMMITS, NoSuchRef, _ASK_FOR_REF),
    (_REFUSED, errors.NoSuchRepository, "Check --url, and that git may read it without being asked for a password."),
    ("", GitHostUnreachable, _TRY_LATER),
)


class Record(BaseModel):
    """What ``vendor/OpenAgents`` holds.

    ``commit`` is a full hash, or ``starter``; ``fetched`` is UTC in ISO 8601; ``tree`` is what ``tree_hash`` said then.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["openagents", "starter"]
    url: str
    ref: str
    commit: str
    fetched: str = ""
    tree: str = ""

    def __str__(self) -> str:
        """Return it as messages name it."""
        return "the starter" if self.kind == "starter" else f"OpenAgents {self.commit[:7]} ({self.ref}) of {self.url}"


@dataclass(frozen=True)
class Wanted:
    """``commit`` is empty until the host was asked; ``loose``: the default branch will do where it is not."""

    url: str
    ref: str
    commit: str = ""
    loose: bool = False

    @property
    def record(self) -> Record:
        """As it is written down and named in messages: without a user name and password in the URL."""
        url = re.sub(r"^(https?://)[^/@]*@", r"\1", self.url)
        return Record(kind="openagents", url=url, ref=self.ref, commit=self.commit)


def read(vendor: Path = VENDOR) -> Record | None:
    """Return the record of what is in ``vendor``, None if nothing is. Raises NothingFetched if it is half there."""
    place = vendor / NAME
    if not place.is_dir() or not any(place.iterdir()):
        return None
    remedy = "Run ./inv fetch; if it says that something would be lost, look at that first."
    try:
        record = Record.model_validate_json((place / RECORD).read_bytes())
    except (OSError, ValidationError) as error:
        raise NothingFetched(f"{place} has no {RECORD} from fetch", remedy, str(error)) from error
    if not _has_agents(place):
        raise NothingFetched(f"{place} is half there: no agents in .opencode/", remedy)
    return record


def tree_hash(tree: Path) -> str:
    """Return the SHA-256 (hex) over names, executable bits, link targets and contents in ``tree``, without .git."""
    return hashlib.sha256(_listing(tree)).hexdigest()


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
    """Bring ``vendor/OpenAgents`` to the pinned commit, or to what ``url``, ``ref`` or ``latest`` say instead.

    Where the host does not answer and the real one is not there, ``starter`` lets the embedded one in. ``force`` throws
    local edits away. ``dry_run`` changes nothing and returns the record without ``tree`` and ``fetched``.

    Raises GitHostUnreachable, NoSuchRepository, NoSuchRef, NotOpenAgents, LocalEdits, VendorUnusable, DiskFull,
    ToolMissing or LockBroken; what was there is still there then.
    """
    want = wanted(settings, ref=ref, url=url, latest=latest)
    _refuse_unusable(vendor)
    # Asked before the lock is taken too: doing nothing needs no writable vendor/.
    if kept := _kept(want, vendor, force=force):
        return kept
    try:
        import git  # noqa: F401 -- it looks for git when it is imported
    except ImportError as error:
        raise errors.ToolMissing("git cannot be run", "Install git: ./inv setup", str(error)) from error
    if dry_run:
        report.say(f"There is {_whole(vendor) or 'nothing whole'} in {vendor.name}/{NAME}.")
        want = resolved(settings, want)
        report.say(f"Would fetch {want.record}{', or the head of its default branch' if want.loose else ''}.")
        return want.record
    with _held(vendor) as incoming:
        tree = incoming / NAME
        try:
            arrived = _real(settings, want, vendor, tree, force=force)
        except GitHostUnreachable as fault:
            there = _whole(vendor)
            if not starter or (there and there.kind == "openagents"):
                raise
            arrived = _starter(fault, there, vendor, tree)
        if (tree / RECORD).exists():
            if not force:
                _refuse_edits(vendor / NAME)
            swap(tree, vendor / NAME)
            report.ok(f"{arrived} is in {vendor.name}/{NAME}")
        return arrived


def wanted(settings: Settings, *, ref: str = "", url: str = "", latest: bool = False) -> Wanted:
    """Return what the arguments ask for, else the settings, else the pin. Raises LockBroken."""
    try:
        pinned = Wanted(**json.loads(PIN.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        remedy = "Restore it: git checkout locks/openagents.json"
        raise errors.LockBroken(f"{PIN} has no url, ref and commit in JSON", remedy, str(error)) from error
    url, ref = url or settings.openagents.url or pinned.url, ref or settings.openagents.ref
    url = address(url)
    if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", ref):
        return Wanted(url, ref, ref)
    if ref or latest:
        return Wanted(url, ref or pinned.ref)
    return replace(pinned, url=url, loose=url != pinned.url)


def address(url: str) -> str:
    """Return ``url``, and as a URL what is a path: git ignores --depth and --filter for a plain one."""
    local = Path(url).expanduser()
    return local.resolve().as_uri() if "://" not in url and (local.exists() or ":" not in url) else url


def _real(settings: Settings, want: Wanted, vendor: Path, tree: Path, *, force: bool) -> Record:
    try:
        want = resolved(settings, want)
        return _kept(want, vendor, force=force) or _clone(settings, want, tree)
    except NoSuchRef:
        if not want.loose:
            raise
        report.say(f"{want.record.url} does not have {want.commit[:7]}, which is pinned: taking its default branch.")
        return _real(settings, Wanted(want.url, "HEAD"), vendor, tree, force=force)


def _whole(vendor: Path) -> Record | None:
    with contextlib.suppress(NothingFetched):
        return read(vendor)
    return None


def _kept(want: Wanted, vendor: Path, *, force: bool) -> Record | None:
    """Return the record of what is there if that is what is wanted, None if there is something to do."""
    there = _whole(vendor)
    # Another repository may not have the pinned commit, though it is here: it is asked.
    if there is None or there.commit != want.commit or (want.loose and there.url != want.record.url):
        return None
    if tree_hash(vendor / NAME) == there.tree:
        report.ok(f"{there} is there already")
    elif force:
        return None
    else:
        report.warn(f"{there} is there already, with local edits, which are kept; --force throws them away.")
    return there


def _starter(fault: GitHostUnreachable, there: Record | None, vendor: Path, tree: Path) -> Record:
    report.warn(
        f"OpenAgents could not be fetched: {fault.what}\n"
        "vendor/starter, a small stand-in of our own, is used instead. An image built with it carries a label that\n"
        "says so, and does not replace a `latest` that was built with the real one.\n"
        "For the real one, when the host answers or from a clone: ./inv fetch, or ./inv fetch --url CLONE"
    )
    if there and (there.tree == tree_hash(STARTER) or there.tree != tree_hash(vendor / NAME)):
        return there
    shutil.rmtree(tree, ignore_errors=True)  # what the fetch that failed has left
    shutil.copytree(STARTER, tree, symlinks=True)
    version = (STARTER / "VERSION").read_text().strip()
    return _sealed(tree, Record(kind="starter", url="vendor/starter", ref=version, commit="starter"))


def _clone(settings: Settings, want: Wanted, tree: Path) -> Record:
    from git import Repo

    report.say(f"Fetching {want.record}")
    repo = Repo.init(tree)
    with repo.config_writer() as config:
        config.set_value("core", "autocrlf", "false")  # the same bytes, and so the same hash, everywhere
        config.set_value("core", "hooksPath", os.devnull)  # a user's global hooks have no say in here
        config.set_value("gc", "auto", "0")  # it would outlive us in a directory that is about to move
        config.set_value('remote "origin"', "url", want.record.url)
    (tree / ".git" / "info").mkdir(exist_ok=True)
    (tree / ".git" / "info" / "exclude").write_text("/.fetched.*\n")
    words = ["fetch", "--progress", "--no-tags"]
    try:
        talk(settings, want, [*words, "--depth=1", "--", want.url, want.commit], tree)
    except NoSuchRef as fault:
        if not re.search(_NO_SINGLE_COMMITS, fault.details):
            raise
        report.say("The server hands out no single commits: fetching its whole history.")
        refs = ("+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*")
        talk(settings, want, [*words, "--", want.url, *refs], tree)
        if not repo.git.rev_list("--max-count=1", "--ignore-missing", want.commit):
            raise
    repo.git.checkout("--quiet", "--detach", want.commit)
    if not _has_agents(tree):
        raise errors.NotOpenAgents(f"{want.record} has no agents in .opencode/", "Check --url and --ref.")
    return _sealed(tree, want.record)


def resolved(settings: Settings, want: Wanted) -> Wanted:
    """Return ``want`` with a commit: the one its ref is at now; for HEAD also with the default branch as ref.

    Raises GitHostUnreachable, NoSuchRepository or NoSuchRef.
    """
    if want.commit:
        return want
    tag = f"refs/tags/{want.ref}"
    names = ["HEAD"] if want.ref == "HEAD" else [f"refs/heads/{want.ref}", f"{tag}^{{}}", tag]
    said = talk(settings, want, ["ls-remote", "--symref", "--", want.url, *names])
    found = {name: value for value, _, name in (line.partition("\t") for line in said.splitlines())}
    commit = next((found[name] for name in names if name in found), "")
    if not commit:
        raise NoSuchRef(f"{want.record.url} has no {want.ref}", _ASK_FOR_REF)
    branch = re.match(r"ref: refs/heads/(.*)\tHEAD\n", said)
    return replace(want, ref=branch[1] if branch else want.ref, commit=commit)


def talk(settings: Settings, want: Wanted, words: list[str], cwd: Path | None = None) -> str:
    """Run one git command that talks to the host, as often as the settings allow, and return its stdout.

    Raises GitHostUnreachable, NoSuchRepository, NoSuchRef, DiskFull.
    """
    import stamina
    from stamina.instrumentation import RetryDetails, set_on_retry_hooks

    def told(details: RetryDetails) -> None:
        report.say(f"{getattr(details.caused_by, 'what', '')}; trying again in {details.wait_for:.1f} s")

    set_on_retry_hooks([told])
    patient = stamina.retry(
        on=GitHostUnreachable, attempts=settings.network.attempts, timeout=None, wait_initial=0.5, wait_jitter=0.2
    )
    return patient(_talk_once)(settings, want, words, cwd)


def _talk_once(settings: Settings, want: Wanted, words: list[str], cwd: Path | None) -> str:
    from git import Git
    from git.util import CallableRemoteProgress

    patience, env = settings.network.stall_seconds, {"GIT_TERMINAL_PROMPT": "0"}
    if settings.ca and "GIT_SSL_CAINFO" not in os.environ:
        env["GIT_SSL_CAINFO"] = str(Path(settings.ca).expanduser().resolve())
    # A session of its own keeps Ctrl-C from git, and ssh from asking on our terminal.
    git = Git(cwd).execute(["git", *words], as_process=True, env=env, start_new_session=True)
    try:
        with _shown() as update:
            progress = CallableRemoteProgress(update)
            hear, rest = progress.new_message_handler(), ""
            # Whatever the protocol, a stall is silence on stderr: --progress tells of all that arrives.
            while select.select([git.stderr], [], [], patience)[0]:
                if not (heard := os.read(git.stderr.fileno(), 65536)):
                    break
                *lines, rest = re.split("[\r\n]+", rest + heard.decode(errors="replace"))
                for line in lines:
                    hear(line)
            else:
                raise GitHostUnreachable(f"{want.record.url} said nothing for {patience} s", _TRY_LATER)
        stdout = git.communicate()[0].decode(errors="replace")
    finally:
        if git.poll() is None:
            os.killpg(git.pid, signal.SIGKILL)
            git.communicate()
    if git.returncode == 0:
        return str(stdout)
    said = "\n".join(progress.other_lines + progress.error_lines).replace(want.url, want.record.url)
    failure, remedy = next((kind, remedy) for pattern, kind, remedy in _WORDS if re.search(pattern, said))
    first = (progress.error_lines or [f"git ended with {git.returncode}"])[0]
    first = re.sub("^(fatal: )?(unable to access '.*': )?", "", first.replace(want.url, want.record.url))
    raise failure(f"{want.record.url}: {first}", remedy, said)


@contextlib.contextmanager
def _shown() -> Iterator[Callable[..., None]]:
    """Yield what takes git's progress: a bar on a terminal, otherwise a line every five seconds."""
    from rich.progress import BarColumn, Progress, TextColumn

    said, interval = time.monotonic(), 5.0
    columns = (BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=report.console(), transient=True, disable=not report.console().is_terminal) as bar:
        task = bar.add_task("", total=0)

        def update(_phase: int, done: float, total: float | None, rate: str) -> None:
            nonlocal said
            text = f"{done:.0f} of {total or 0:.0f} {rate}".rstrip()
            bar.update(task, completed=done, total=total or 0, description=text)
            if bar.disable and time.monotonic() - said > interval:
                said = time.monotonic()
                report.say(f"  {text}")

        yield update


def _refuse_unusable(vendor: Path) -> None:
    for path in (vendor, vendor / NAME):
        if path.is_symlink():
            remedy = "Remove the link; a clone that is elsewhere is what --url is for."
            raise VendorUnusable(f"{path} is a symlink, and a build sees only what is in this repository", remedy)
        if path.exists() and not path.is_dir():
            raise VendorUnusable(f"{path} is not a directory", "Move that file away, then fetch again.")


def _refuse_edits(place: Path) -> None:
    """Raise LocalEdits if something in ``place`` would be lost with it."""
    before = (place / LISTING).read_bytes() if (place / LISTING).exists() else b""
    differing = {*before.split(b"\n")} ^ {*_listing(place).split(b"\n")}
    changed = {os.fsdecode(line.partition(b" ")[2]) for line in differing - {b""}}
    own = [*place.glob(".git/refs/heads/**/*"), *place.glob(".git/refs/stash")]  # fetch leaves neither
    changed |= {str(path.relative_to(place)) for path in own if path.is_file()}
    if not _has_agents(place):  # half there: what is missing cannot be lost
        changed = {name for name in changed if os.path.lexists(place / name)}
    if changed:
        names, shown = sorted(changed), 5
        more = f"\n  and {len(names) - shown} more" if len(names) > shown else ""
        raise LocalEdits(
            f"{place} holds what fetch did not put there",
            "Move it away to keep it, or throw it away with --force.",
            "\n".join(f"  {name}" for name in names[:shown]) + more,
        )


def _has_agents(tree: Path) -> bool:
    return any(next((tree / ".opencode" / name).rglob("*.md"), None) for name in ("agent", "agents"))


def _sealed(tree: Path, record: Record) -> Record:
    """Write ``record`` into ``tree``, with the time and with what is there, so that edits can be told later."""
    listing = _listing(tree)
    (tree / LISTING).write_bytes(listing)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record = record.model_copy(update={"fetched": now, "tree": hashlib.sha256(listing).hexdigest()})
    (tree / RECORD).write_text(record.model_dump_json(indent=2) + "\n")
    return record


def _listing(tree: Path) -> bytes:
    """Return a line of hash and name for each file and link under ``tree``, sorted."""
    found = []
    top = len(str(tree)) + 1
    for folder, folders, files in os.walk(tree):
        if folder == str(tree):
            for names in (folders, files):
                names[:] = [name for name in names if name not in (".git", RECORD, LISTING)]
        for name in files + folders:
            path = os.path.join(folder, name)  # noqa: PTH118 -- a thousand Path objects would be most of the cost
            mode = os.lstat(path).st_mode
            if stat.S_ISDIR(mode):
                continue
            data = b"neither file nor link"
            if stat.S_ISLNK(mode):
                data = b"link " + os.fsencode(os.readlink(path))  # noqa: PTH115
            elif stat.S_ISREG(mode):
                with open(path, "rb") as file:  # noqa: PTH123
                    data = (b"x " if mode & stat.S_IXUSR else b"- ") + file.read()
            found.append(os.fsencode(f"{hashlib.sha256(data).hexdigest()} {path[top:]}"))
    return b"\n".join(sorted(found))


def swap(tree: Path, place: Path) -> None:
    """Put ``tree`` where ``place`` is, in one step where the file system can; what was there is then in ``tree``."""
    if place.exists():
        if exchange(tree, place):
            return
        place.rename(tree.with_name("old"))
    tree.rename(place)


def exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; False where the system or the file system cannot."""
    libc, here, exchange = ctypes.CDLL(None), -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    swapped = hasattr(libc, "renameat2") and libc.renameat2(here, bytes(one), here, bytes(other), exchange) == 0
    return bool(swapped)


def _tidy(vendor: Path) -> None:
    """Undo a swap that ended between its two renames, and remove what a fetch has left."""
    for old in vendor.glob(".incoming-*/old"):
        if not (vendor / NAME).exists():
            old.rename(vendor / NAME)
    for incoming in vendor.glob(".incoming-*"):
        shutil.rmtree(incoming, ignore_errors=True)


@contextlib.contextmanager
def _held(vendor: Path) -> Iterator[Path]:
    """Hold ``vendor`` alone and yield an empty directory in it; name the faults of its file system."""
    from filelock import FileLock, Timeout
    from git.exc import GitError

    try:
        vendor.mkdir(parents=True, exist_ok=True)
        lock = FileLock(vendor / ".lock")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            report.say("Another fetch is at work: waiting for it.")
            held = lock.acquire()
        with held:
            _tidy(vendor)
            try:
                yield Path(tempfile.mkdtemp(prefix=".incoming-", dir=vendor))
            finally:
                _tidy(vendor)
    except (OSError, GitError) as error:
        if re.search(_FULL, str(error)):
            raise errors.DiskFull(f"No space is left in {vendor}", _MAKE_ROOM, str(error)) from error
        remedy = f"Make {vendor} a directory that you may write to, then fetch again."
        raise VendorUnusable(f"{vendor} cannot be written: {error}", remedy) from error
