"""The working directory: private, for one run at a time, and empty afterwards."""

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

from lib.backup.errors import Busy, NotConfigured

LAST = "last.json"


@contextlib.contextmanager
def working(root: Path) -> Iterator[Path]:
    """Yield a new directory below ``root`` and remove it at the end, with what killed runs left.

    Raises Busy when another run holds the lock, NotConfigured when ``root`` cannot be used.
    """
    lock = acquire(root)
    try:
        for leftover in root.glob("run-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix="run-", dir=root))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    finally:
        os.close(lock)


def acquire(root: Path) -> int:
    """Create ``root`` and return the file descriptor of its lock. Raises Busy, NotConfigured."""
    remedy = "Set BACKUP_WORK_DIR to a directory of this user."
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = root.lstat()
        # Below /var/tmp, another user could have created it, or a link of that name.
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise NotConfigured(f"{root} does not belong to this user", remedy)
        root.chmod(0o700)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        lock = os.open(root / "lock", flags, 0o600)
    except OSError as error:
        raise NotConfigured(f"{root}: {error.strerror}", remedy) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise Busy(f"another backup or restore works in {root}", "Wait until it ends.") from None
    return lock


def record(root: Path, outcome: dict[str, Any]) -> None:
    """Write how the last run ended, for ``backup status``. A full disk is ignored."""
    draft = root / f"{LAST}.part"
    try:
        draft.write_text(json.dumps(outcome))
        draft.replace(root / LAST)
    except OSError:
        draft.unlink(missing_ok=True)


def last(root: Path) -> dict[str, Any]:
    """Return how the last run ended; empty when it is not known."""
    try:
        return dict(json.loads((root / LAST).read_text()))
    except (OSError, ValueError):
        return {}
