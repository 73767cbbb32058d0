"""Where backups are kept: any remote of rclone's, described by the environment alone, optionally encrypted."""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from backup_lib import children
from backup_lib.errors import (
    DiskFull,
    Failure,
    NotConfigured,
    RemoteGone,
    RemoteRefused,
    RemoteUnreachable,
    WrongPassword,
)
from backup_lib.settings import CRYPT, Settings

ATTEMPTS = 3
T = TypeVar("T")
KINDS: tuple[tuple[str, type[Failure], str], ...] = (
    ("bad password|bad magic string|not an encrypted file|failed to authenticate decrypted", WrongPassword,
     "Set BACKUP_PASSWORD to what it was when they were made; a new password needs a new path in BACKUP_REMOTE."),
    (r"no space left on device|remaining disk space|quota", DiskFull, "Free some there, or here in BACKUP_WORK_DIR."),
    (r"\b401\b|\b403\b|unauthorized|bad_auth_token|AccessDenied|SignatureDoesNotMatch|not entitled", RemoteRefused,
     "Look at the RCLONE_CONFIG_* keys, and at what they are allowed."),
    ("didn't find section in config file|unknown type|bad type|couldn't find type", NotConfigured,
     "Look at the RCLONE_CONFIG_* variables."),
    ("directory not found|bucket .*not found|NoSuchBucket", RemoteGone,
     "Look whether it was deleted or renamed. For the first backup there: backup run --create."),
)  # fmt: skip


class Remote:
    """Backups are directories at the remote: ``<id>/<object>``. Every failure of rclone's is raised by name."""

    def __init__(self, settings: Settings) -> None:
        if not settings.remote:
            raise NotConfigured("BACKUP_REMOTE is not set", "Set it as in b2:bucket/path; see docs/backup.md.")
        self.name = settings.remote.rstrip("/")
        self._settings = settings
        environ = {
            # Its own file would be written to when there is a token to renew; here all is in the environment.
            "RCLONE_CONFIG": "/dev/null",
            "RCLONE_CONTIMEOUT": "15s",
            "RCLONE_TIMEOUT": f"{settings.stall_seconds:g}s",
            "RCLONE_RETRIES": "3",
            "RCLONE_RETRIES_SLEEP": "1s",
            "RCLONE_LOW_LEVEL_RETRIES": "5",
            # B2 otherwise keeps, and bills, what was deleted as hidden versions.
            "RCLONE_B2_HARD_DELETE": "true",
        } | dict(settings.environ)
        if settings.password:
            # Names stay readable: with encrypted ones and a wrong password rclone lists nothing, and says that is fine.
            environ |= {
                f"RCLONE_CONFIG_{CRYPT}_TYPE": "crypt",
                f"RCLONE_CONFIG_{CRYPT}_REMOTE": self.name,
                f"RCLONE_CONFIG_{CRYPT}_FILENAME_ENCRYPTION": "off",
                f"RCLONE_CONFIG_{CRYPT}_PASSWORD": self._obscured(environ),
            }
        self._environ = environ

    def _obscured(self, environ: dict[str, str]) -> str:
        """Return the password as rclone wants it. It goes through a pipe: an argv can be read in ``ps``."""
        done = children.run(["rclone", "obscure", "-"], environ, stdin=self._settings.password.encode())
        if done.code:
            raise NotConfigured("rclone cannot take BACKUP_PASSWORD", "It must not be empty.")
        return done.stdout.decode().strip()

    def path(self, name: str = "") -> str:
        """Return what rclone calls an object, or all of it."""
        if self._settings.password:
            return f"{CRYPT}:{name}"
        return self.name + ("" if self.name.endswith(":") or not name else "/") + name

    def _failure(self, doing: str, stderr: str) -> Failure:
        said = self._settings.hide(" / ".join(stderr.splitlines()[-3:]))
        for pattern, kind, remedy in KINDS:
            if re.search(pattern, stderr, re.IGNORECASE):
                return kind(f"{doing} {self.name}: {said}", remedy)
        remedy = "Look whether the network is there; the last good backup is untouched."
        return RemoteUnreachable(f"{doing} {self.name}: {said}", remedy)

    def _argv(self, *words: str) -> list[str]:
        # What prints what it reads would begin anew on the same stdout: we try again ourselves.
        retries = ["--retries", "1"] if words[0] in ("cat", "hashsum") else []
        return ["rclone", *retries, "--stats", "0", "--log-format", "", *words]

    def _run(self, doing: str, *words: str, stdin: bytes = b"") -> bytes:
        done = children.run(self._argv(*words), self._environ, stdin=stdin)
        if done.code:
            raise self._failure(doing, done.stderr)
        return done.stdout

    def sizes(self, *, create: bool = False) -> dict[str, int]:
        """Return the size of each object, by ``<id>/<object>``; as stored before encryption.

        Raises RemoteGone when the bucket or directory is not there, unless it may be created.
        """
        try:
            said = self._run("listing", "lsjson", "--recursive", "--files-only", "--no-modtime", self.path())
        except RemoteGone:
            if not create:
                raise
            return {}
        return {each["Path"]: each["Size"] for each in json.loads(said)}

    def manifests(self) -> Iterator[dict[str, Any]]:
        """Yield every manifest that can be read, in one call. Raises WrongPassword when none can, for that reason."""
        argv = self._argv("cat", "--include", "/*/manifest.json", self.path())
        done = children.run(argv, self._environ)
        found = 0
        for line in done.stdout.splitlines():
            try:
                manifest = json.loads(line)
            except ValueError:
                continue
            if isinstance(manifest, dict):
                found += 1
                yield manifest
        if done.code and not found:
            raise self._failure("reading manifests at", done.stderr)

    def read(self, name: str) -> bytes:
        """Return a small object."""
        return self._patiently(lambda: self._run(f"reading {name} at", "cat", self.path(name)))

    @staticmethod
    def _patiently(read: Callable[[], T]) -> T:
        for _ in range(ATTEMPTS - 1):
            try:
                return read()
            except RemoteUnreachable:
                time.sleep(1)
        return read()

    def write(self, name: str, data: bytes) -> None:
        """Store a small object."""
        self._run(f"writing {name} to", "rcat", self.path(name), stdin=data)

    def upload(self, source: Path, backup: str) -> None:
        """Store the files of a directory as the objects of a backup."""
        self._run(f"writing {backup} to", "copy", "--no-traverse", "--ignore-times", str(source), self.path(backup))

    def download(self, backup: str, names: Iterable[str], target: Path) -> None:
        """Copy objects of a backup into a directory."""
        chosen = [word for name in names for word in ("--include", f"/{name}")]
        self._run(f"reading {backup} at", "copy", "--ignore-times", *chosen, self.path(backup), str(target))

    def digests(self, backup: str) -> dict[str, str]:
        """Read a whole backup back and return the SHA-256 of each object, as it was before encryption."""
        words = ("hashsum", "SHA256", "--download", "--exclude", "/manifest.json", self.path(backup))
        said = self._patiently(lambda: self._run(f"reading {backup} at", *words))
        return {name: digest for digest, name in (line.split(None, 1) for line in said.decode().splitlines())}

    def remove(self, backup: str) -> None:
        """Remove a backup: its manifest first, so that it stops to count before anything is missing from it."""
        self._run(f"removing {backup} at", "delete", "--include", "/manifest.json", self.path(backup))
        self._run(f"removing {backup} at", "purge", self.path(backup))
