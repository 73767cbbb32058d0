"""The working directory: ours alone, one run at a time, nothing left in it."""

import contextlib
import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backup_lib.errors import Busy, NotConfigured


@contextlib.contextmanager
def working(root: Path) -> Iterator[Path]:
    """Yield a fresh directory that only we can read; it is removed at the end, and so is what a killed run left.

    Raises Busy when another run is under way, NotConfigured when ``root`` cannot be ours.
    """
    lock = _lock(root)
    try:
        for left in root.glob("run-*"):  # we hold the lock, so whoever made it is dead
            shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix="run-", dir=root))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    finally:
        os.close(lock)


def _lock(root: Path) -> int:
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        seen = root.lstat()
        # It may be in /var/tmp, where somebody else could have made it, or a link, before us.
        if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.getuid():
            raise NotConfigured(f"{root} is not a directory of ours", "Set BACKUP_WORK_DIR to another one.")
        root.chmod(0o700)
        lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise NotConfigured(f"{root}: {error.strerror}", "Set BACKUP_WORK_DIR to a directory of ours.") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise Busy(
            f"another backup or restore works in {root}", "Wait for it; it says in its log what it does."
        ) from None
    return lock


def remember(root: Path, outcome: dict[str, Any]) -> None:
    """Keep how the last run ended, for ``backup status``; a full disk is no reason to fail once more."""
    draft = root / "last.json.part"
    try:
        draft.write_text(json.dumps(outcome))
        draft.replace(root / "last.json")
    except OSError:
        draft.unlink(missing_ok=True)


def recall(root: Path) -> dict[str, Any]:
    """Return how the last run ended; empty when none is known."""
    try:
        return dict(json.loads((root / "last.json").read_text()))
    except (OSError, ValueError):
        return {}
