"""Git commands that talk to a remote: progress, stalls, retries and named failures."""

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
