"""Git commands that talk to a remote: progress, stalls, retries, named failures, and a clone."""

from __future__ import annotations

import os
import re
import select
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.core import console
from pipeline.core.errors import (
    DiskFull,
    GitHostUnreachable,
    NoSuchRef,
    NoSuchRepository,
    NotOpenAgents,
    PipelineError,
    printable,
)
from pipeline.core.retry import retry
from pipeline.core.settings import Settings

# git exits with 128 for every fault: only its messages tell them apart. GitPython sets LC_ALL=C.
DISK_FULL = "No space left|quota exceeded|Out of diskspace|unable to write"
_NO_REF = "not our ref|find remote ref|unadvertised object|dumb http"
_REFUSED = (
    "error: 40[134]|not found|not exist|not appear to be|not a git repository|not allowed|"
    "not exported|valid: is|could not read|Authentication failed|Permission denied|Host key|"
    "ownership|remote helper|not a git command"
)
_UNREACHABLE = (
    "Try again later, or set --url to a mirror or a local clone. "
    "If TLS is intercepted, set --ca to the CA certificate file."
)

MOVED = {
    "https://github.com/darrenhinde/OpenAgents": "https://github.com/darrenhinde/OpenAgentsControl"
}
"""New addresses of repositories. GitHub redirects from the old one until its owner removes it."""

LFS = b"version https://git-lfs.github.com/spec/"
"""How a file begins whose content is in Git LFS: https://github.com/git-lfs/git-lfs."""

SUBMODULE = "160000"
"""The mode of a submodule in git's index."""


def run(settings: Settings, url: str, words: list[str], cwd: Path | None = None) -> str:
    """Run ``git WORDS``, which talks to ``url``, and return its stdout.

    A host that does not answer is tried again, as often as network.attempts says, and a repository
    that is gone at its new address. Raises GitHostUnreachable, NoSuchRepository, NoSuchRef or
    DiskFull.
    """
    once = partial(_run_once, settings, url, words, cwd)
    try:
        return retry(once, on=GitHostUnreachable, attempts=settings.network.attempts)
    except NoSuchRepository as failure:
        if url not in MOVED:
            raise
        console.log(f"{failure.what}; trying {MOVED[url]}")
        words = [MOVED[url] if word == url else word for word in words]
        return run(settings, MOVED[url], words, cwd)


def clone(settings: Settings, url: str, ref: str, commit: str, tree: Path) -> None:
    """Check ``commit`` out in ``tree``, which must not exist; ``ref`` is a branch that has it.

    Raises as ``run``, and NotOpenAgents.
    """
    from git import Repo

    repo = Repo.init(tree)
    (tree / ".git" / "info").mkdir(exist_ok=True)
    (tree / ".git" / "info" / "exclude").write_text("/.fetched.*\n")
    words = ["fetch", "--progress", "--no-tags", "--no-recurse-submodules"]
    try:
        run(settings, url, [*words, "--depth=1", "--", url, commit], tree)
    except NoSuchRef as failure:
        if "unadvertised" not in failure.details or ref == commit:
            raise
        # Version 0 of the protocol serves only tips: the commit is in the history of the branch.
        run(settings, url, [*words, "--", url, ref], tree)
        if commit not in repo.git.rev_list("FETCH_HEAD").split():
            raise
    repo.create_remote("origin", console.without_credentials(url))
    # The same bytes on every machine, and no hooks of the user's.
    plain = ["core.autocrlf=false", "core.symlinks=true", f"core.hooksPath={os.devnull}"]
    repo.git(c=plain).checkout("--quiet", "--detach", "--no-recurse-submodules", commit)
    if faults := list(_faults(tree, repo.git.ls_files("-s", "-z").split("\0")[:-1])):
        raise NotOpenAgents(
            f"{console.without_credentials(url)} has files that cannot be built: {faults[0]}",
            "Use a commit without them: inv fetch --url URL --ref REF",
            "\n".join(faults),
        )


def _faults(tree: Path, entries: list[str]) -> list[str]:
    """Return what is wrong with the files of git's index; no file of another place is read."""
    faults = []
    inside = tree.resolve()
    for entry in entries:
        facts, name = entry.split("\t", 1)
        path, mode = tree / name, facts.split()[0]
        shown = printable(name).replace("\n", " ")
        if mode == SUBMODULE:
            faults.append(f"{shown} is a git submodule, which is not fetched")
        elif shown != name or name.startswith(".fetched."):
            faults.append(f"{shown} is not a name for a file")
        elif path.is_symlink():
            if not Path(os.path.realpath(path)).is_relative_to(inside):
                faults.append(f"{shown} links to {path.readlink()}, outside")
        elif path.stat().st_size < 1024 and path.read_bytes().startswith(LFS):  # noqa: PLR2004
            faults.append(f"{shown} is a pointer of Git LFS: install git-lfs, then fetch again")
    return faults


def _run_once(settings: Settings, url: str, words: list[str], cwd: Path | None) -> str:
    from git import Git

    env = {"GIT_TERMINAL_PROMPT": "0"}
    if settings.ca and "GIT_SSL_CAINFO" not in os.environ:
        env["GIT_SSL_CAINFO"] = str(Path(settings.ca).expanduser().resolve())
    # In a session of its own git gets no Ctrl-C, and ssh cannot prompt on the terminal.
    child = Git(cwd).execute(["git", *words], as_process=True, env=env, start_new_session=True)
    messages = []
    try:
        with console.console().status(f"git {words[0]}") as status:
            for line in _stderr_lines(child, settings.network.stall_seconds):
                if "%" in line:
                    status.update(printable(line))
                else:
                    messages.append(printable(line))
        stdout = child.communicate()[0].decode(errors="replace")
    except TimeoutError as error:
        raise _failure(url, [str(error)]) from error
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    if child.returncode:
        raise _failure(url, messages or [f"git exited with {child.returncode}"])
    return str(stdout)


def _stderr_lines(child: Any, seconds: float) -> Iterator[str]:
    """Yield git's messages and progress as they come. Raises TimeoutError after silence.

    With --progress git reports all data that arrives, so silence is a stall in every protocol.
    """
    rest = ""
    while select.select([child.stderr], [], [], seconds)[0]:
        chunk = os.read(child.stderr.fileno(), 65536)
        if not chunk:
            return
        *lines, rest = re.split("[\r\n]+", rest + chunk.decode(errors="replace"))
        yield from lines
    raise TimeoutError(f"no data for {seconds} s")


def _failure(url: str, messages: list[str]) -> PipelineError:
    """Return the failure that git's ``messages`` mean, without the credentials of ``url``."""
    public = console.without_credentials(url)
    output = "\n".join(messages).replace(url, public)
    fatal = re.search("^(?:fatal|error): (?:unable to access '.*': )?(.*)", output, re.MULTILINE)
    what = f"{public}: {fatal[1] if fatal else messages[0]}"
    if re.search(DISK_FULL, output):
        return DiskFull(
            what,
            "Free up space on the disk that holds vendor/.",
            output,
        )
    if re.search(_NO_REF, output):
        remedy = "Set --ref to a branch, a tag or a full commit hash of that repository."
        return NoSuchRef(
            what,
            remedy,
            output,
        )
    if re.search(_REFUSED, output):
        remedy = "Check --url, and that git can read the repository without a password prompt."
        return NoSuchRepository(
            what,
            remedy,
            output,
        )
    return GitHostUnreachable(
        what,
        _UNREACHABLE,
        output,
    )
