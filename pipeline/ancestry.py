"""Whether a branch still has the commit that was pinned: a forced push takes it out. Its host is asked for no files."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.openagents import Wanted, talk
from pipeline.settings import Settings


def remark(settings: Settings, want: Wanted, old: str) -> str:
    """Return what is to be said of ``want``, whose branch was at ``old`` before; nothing where it has only gone on.

    It costs the host two answers, of commits alone: 20 KB or so for a hundred.
    """
    try:
        commits = _history(settings, want)
    except PipelineError as fault:
        commits, why = [], fault.what
    else:
        why = f"{want.record.url} hands out no commits without their files"
    if old in commits:
        return ""
    if commits:
        return f"{want.ref} was rewritten (a forced push): {old[:12]}, which was pinned, is no longer in its history"
    return f"whether {want.ref} was rewritten since {old[:12]} is not known: {why}"


def _history(settings: Settings, want: Wanted) -> list[str]:
    """Return every commit in the history of ``want``; none where the host would send files with them."""
    from git import Repo

    with tempfile.TemporaryDirectory(prefix="opencode-server-history-", ignore_cleanup_errors=True) as scratch:
        repo = Repo.init(scratch, bare=True)
        words = ["fetch", "--progress", "--no-tags", "--filter=tree:0"]
        if want.url.startswith("file:"):  # nobody has set up a clone on this machine as a server
            words += ["--upload-pack", "git -c uploadpack.allowFilter=true upload-pack"]
        # One commit first: a server that cannot leave files out says nothing of it and sends them.
        talk(settings, want, [*words, "--depth=1", "--", want.url, want.commit], Path(scratch))
        if "?" not in repo.git.rev_list("--objects", "--missing=print", "--max-count=1", want.commit):
            return []
        talk(settings, want, [*words, "--unshallow", "--", want.url, want.commit], Path(scratch))
        if (Path(scratch) / "shallow").exists():  # the host has only a part of it itself
            return []
        return str(repo.git.rev_list(want.commit)).split()
