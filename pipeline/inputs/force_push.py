"""Whether a branch still contains a commit; a forced push removes it. No files are fetched."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.settings import Settings
from pipeline.inputs import git
from pipeline.inputs.openagents import Wanted


def remark(settings: Settings, want: Wanted, old: str) -> str:
    """Return a notice if the history of ``want`` lacks ``old``, or cannot be read; else nothing.

    It takes two requests for commits alone: about 20 KB for a hundred.
    """
    try:
        commits = _history(settings, want)
    except PipelineError as failure:
        return f"cannot tell whether {want.ref} was rewritten since {old[:12]}: {failure.what}"
    if not commits:
        reason = f"{want.record.url} does not serve commits without their files"
        return f"cannot tell whether {want.ref} was rewritten since {old[:12]}: {reason}"
    if old in commits:
        return ""
    return f"{want.ref} was rewritten (forced push): it no longer contains {old[:12]}, the old pin"


def _history(settings: Settings, want: Wanted) -> list[str]:
    """Return every commit in the history of ``want``; none if the host would send files too."""
    from git import Repo

    words = [
        "fetch",
        "--progress",
        "--no-tags",
        "--filter=tree:0",
    ]
    if want.url.startswith("file:"):  # a local clone is not configured as a server
        words += ["--upload-pack", "git -c uploadpack.allowFilter=true upload-pack"]
    source = ["--", want.url, want.commit]
    with tempfile.TemporaryDirectory(
        prefix="opencode-server-history-", ignore_cleanup_errors=True
    ) as scratch:
        place = Path(scratch)
        repo = Repo.init(place, bare=True)
        # One commit first: a server that cannot leave files out sends them without a word.
        git.run(settings, want.url, [*words, "--depth=1", *source], place)
        shown = repo.git.rev_list("--objects", "--missing=print", "--max-count=1", want.commit)
        if "?" not in shown:
            return []
        git.run(settings, want.url, [*words, "--unshallow", *source], place)
        if (place / "shallow").exists():  # the host itself has a part of the history only
            return []
        return str(repo.git.rev_list(want.commit)).split()
