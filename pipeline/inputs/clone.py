"""A shallow clone of one commit, refused if its files are unsafe or not all there."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.core.console import without_credentials
from pipeline.core.errors import NoSuchRef, NotOpenAgents, printable
from pipeline.core.settings import Settings
from pipeline.inputs import git

LFS = b"version https://git-lfs.github.com/spec/"
"""How a file begins whose content is in Git LFS: https://github.com/git-lfs/git-lfs."""

SUBMODULE = "160000"
"""The mode of a submodule in git's index."""


def clone(settings: Settings, url: str, ref: str, commit: str, tree: Path) -> None:
    """Check ``commit`` out in ``tree``, which must not exist; ``ref`` is a branch that has it.

    Raises as ``git.run``, and NotOpenAgents.
    """
    from git import Repo

    repo = Repo.init(tree)
    (tree / ".git" / "info").mkdir(exist_ok=True)
    (tree / ".git" / "info" / "exclude").write_text("/.fetched.*\n")
    words = ["fetch", "--progress", "--no-tags", "--no-recurse-submodules"]
    try:
        git.run(settings, url, [*words, "--depth=1", "--", url, commit], tree)
    except NoSuchRef as failure:
        if "unadvertised" not in failure.details or ref == commit:
            raise
        # Version 0 of the protocol serves only tips: the commit is in the history of the branch.
        git.run(settings, url, [*words, "--", url, ref], tree)
        if commit not in repo.git.rev_list("FETCH_HEAD").split():
            raise
    repo.create_remote("origin", without_credentials(url))
    # The same bytes on every machine, and no hooks of the user's.
    plain = ["core.autocrlf=false", "core.symlinks=true", f"core.hooksPath={os.devnull}"]
    repo.git(c=plain).checkout("--quiet", "--detach", "--no-recurse-submodules", commit)
    if faults := list(_faults(tree, repo.git.ls_files("-s", "-z").split("\0")[:-1])):
        raise NotOpenAgents(
            f"{commit[:7]} of {without_credentials(url)} has files that cannot be built: {faults[0]}",
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
