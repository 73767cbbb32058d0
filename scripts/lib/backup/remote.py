"""Where backups are stored: any remote of rclone, configured by the environment alone."""

import json
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from lib.backup import process
from lib.backup.errors import (
    DiskFull,
    Failure,
    NotConfigured,
    RemoteGone,
    RemoteRefused,
    RemoteUnreachable,
    WrongPassword,
)
from lib.backup.settings import CRYPT, Settings

ATTEMPTS = 3
ERRORS: tuple[tuple[str, type[Failure], str], ...] = (
    (
        "bad password|bad magic string|not an encrypted file|failed to authenticate decrypted",
        WrongPassword,
        "Set BACKUP_PASSWORD to the password of these backups. For a new one, use a new path.",
    ),
    (
        r"no space left on device|remaining disk space|quota",
        DiskFull,
        "Free up space at the remote, or here in BACKUP_WORK_DIR.",
    ),
    (
        r"cap[ _]exceeded",
        RemoteRefused,
        "A cap of the account is reached. Raise it at the provider (B2: Caps & Alerts).",
    ),
    (
        "you must use bucket",
        RemoteRefused,
        "The key is for that bucket only: name it in BACKUP_REMOTE, or use a key of yours.",
    ),
    (
        "restricted to no longer exists",
        RemoteGone,
        "The bucket of the key was deleted: create a bucket and a key for it.",
    ),
    (
        r"object[ _-]?lock|file[ _-]?lock|retention|legal hold",
        RemoteRefused,
        "Object Lock protects it. It can be removed when its retention period ends.",
    ),
    (
        (
            r"\b401\b|\b403\b|unauthorized|bad_auth_token|AccessDenied"
            "|SignatureDoesNotMatch|not entitled"
        ),
        RemoteRefused,
        "Check the keys in RCLONE_CONFIG_*, and their permissions.",
    ),
    (
        "didn't find section in config file|unknown type|bad type|couldn't find type",
        NotConfigured,
        "Check the RCLONE_CONFIG_* variables.",
    ),
    (
        "directory not found|bucket .*not found|NoSuchBucket",
        RemoteGone,
        "Check whether it was deleted or renamed. For the first backup: backup run --create",
    ),
)
"""What rclone's stderr contains, the failure that it means, and the remedy."""


class Remote:
    """Backups are directories at the remote: ``ID/OBJECT``. Raises the Failures of ERRORS."""

    def __init__(self, settings: Settings) -> None:
        if not settings.remote:
            remedy = "Example: BACKUP_REMOTE=b2:bucket/path; see docs/backup.md."
            raise NotConfigured("BACKUP_REMOTE is not set", remedy)
        self.stack = settings.stack
        self.name = settings.remote.rstrip("/")
        self._settings = settings
        self._environ = {
            # rclone writes renewed tokens to its file. The environment holds everything here.
            "RCLONE_CONFIG": "/dev/null",
            "RCLONE_CONTIMEOUT": "15s",
            "RCLONE_TIMEOUT": f"{settings.stall_seconds:g}s",
            "RCLONE_RETRIES": "3",
            "RCLONE_RETRIES_SLEEP": "1s",
            "RCLONE_LOW_LEVEL_RETRIES": "5",
            # B2 otherwise keeps deleted files as hidden versions, and bills them.
            "RCLONE_B2_HARD_DELETE": "true",
            **settings.environ,
        }
        if settings.password:
            # With encrypted names and a wrong password, rclone lists nothing and exits with 0.
            crypt = f"RCLONE_CONFIG_{CRYPT}_"
            self._environ |= {
                f"{crypt}TYPE": "crypt",
                f"{crypt}REMOTE": self.name,
                f"{crypt}FILENAME_ENCRYPTION": "off",
                f"{crypt}PASSWORD": self._obscure(settings.password),
            }

    def _obscure(self, password: str) -> str:
        # Through a pipe: the process list shows arguments.
        done = process.run(["rclone", "obscure", "-"], self._environ, password.encode())
        if done.returncode:
            raise NotConfigured("rclone rejects BACKUP_PASSWORD", "Set another one.")
        return done.stdout.decode().strip()

    def path(self, name: str = "") -> str:
        """Return rclone's path of an object, or of all backups."""
        if self._settings.password:
            return f"{CRYPT}:{name}"
        return self.name + ("" if self.name.endswith(":") or not name else "/") + name

    def _failure(self, action: str, errors: bytes) -> Failure:
        stderr = errors.decode(errors="replace").strip()
        output = self._settings.hide(" / ".join(stderr.splitlines()[-3:]))
        what = f"{action} {self.name}: {output}"
        for pattern, kind, remedy in ERRORS:
            if re.search(pattern, stderr, re.IGNORECASE):
                return kind(what, remedy)
        remedy = "Check the network; the last good backup is untouched."
        return RemoteUnreachable(what, remedy)

    def _run(self, action: str, *words: str, stdin: bytes = b"") -> bytes:
        done = self._complete(*words, stdin=stdin)
        if done.returncode:
            raise self._failure(action, done.stderr)
        return done.stdout

    def _complete(self, *words: str, stdin: bytes = b"") -> CompletedProcess[bytes]:
        argv = ["rclone", "--stats", "0", "--log-format", "", *words]
        return process.run(argv, self._environ, stdin)

    def _read(self, action: str, *words: str) -> bytes:
        # rclone's own retry would start again on the same stdout.
        for _ in range(ATTEMPTS - 1):
            try:
                return self._run(action, "--retries", "1", *words)
            except RemoteUnreachable:
                time.sleep(1)
        return self._run(action, "--retries", "1", *words)

    def sizes(self, *, create: bool = False) -> dict[str, int]:
        """Return the size in bytes of each object, by ``ID/OBJECT``, as before encryption.

        Raises RemoteGone when the bucket or directory is missing, unless ``create`` is set.
        """
        words = (
            "lsjson",
            "--recursive",
            "--files-only",
            "--no-modtime",
            self.path(),
        )
        try:
            output = self._run("listing", *words)
        except RemoteGone:
            if not create:
                raise
            return {}
        return {entry["Path"]: entry["Size"] for entry in json.loads(output)}

    def manifests(self) -> Iterator[dict[str, Any]]:
        """Yield every readable manifest, by one call. Raises WrongPassword when none is."""
        words = ("cat", "--include", "/*/manifest.json", self.path())
        done = self._complete("--retries", "1", *words)
        found = False
        for line in done.stdout.splitlines():
            try:
                manifest = json.loads(line)
            except ValueError:
                continue
            if isinstance(manifest, dict):
                found = True
                yield manifest
        if done.returncode and not found:
            raise self._failure("reading manifests at", done.stderr)

    def read(self, name: str) -> bytes:
        """Return a small object."""
        return self._read(f"reading {name} at", "cat", self.path(name))

    def write(self, name: str, data: bytes) -> None:
        """Store a small object."""
        self._run(f"writing {name} to", "rcat", self.path(name), stdin=data)

    def upload(self, source: Path, backup: str) -> None:
        """Store the files of a directory as the objects of a backup."""
        words = (
            "copy",
            "--no-traverse",
            "--ignore-times",
            str(source),
            self.path(backup),
        )
        self._run(f"writing {backup} to", *words)

    def download(self, backup: str, names: Iterable[str], target: Path) -> None:
        """Copy objects of a backup into a directory."""
        words = ["copy", "--ignore-times"]
        for name in names:
            words += ["--include", f"/{name}"]
        self._run(f"reading {backup} at", *words, self.path(backup), str(target))

    def digests(self, backup: str) -> dict[str, str]:
        """Read a whole backup and return the SHA-256 of each object, as before encryption."""
        words = (
            "hashsum",
            "SHA256",
            "--download",
            "--exclude",
            "/manifest.json",
        )
        output = self._read(f"reading {backup} at", *words, self.path(backup))
        found = {}
        for line in output.decode().splitlines():
            digest, name = line.split(None, 1)
            found[name] = digest
        return found

    def remove(self, backup: str) -> None:
        """Remove a backup; its manifest first, so that it is incomplete from then on."""
        action = f"removing {backup} at"
        self._run(action, "delete", "--include", "/manifest.json", self.path(backup))
        self._run(action, "purge", self.path(backup))
