"""Every failure that is reported to the user: one class and one exit code each.

They are subclasses of Invoke's ``Exit``: Invoke prints the message on stderr and exits with it.
docs/exit-codes.md lists the first line of each docstring.
"""

from __future__ import annotations

import contextlib
import errno
import re
import subprocess
from collections.abc import Iterator
from typing import ClassVar

from invoke.exceptions import Exit

CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)
"""Escape sequences of terminals, and characters that control them or the direction of text."""


def printable(text: str) -> str:
    """Return ``text`` without control characters, except tabs and newlines.

    Names, commits and logs that come from others may hold them.
    """
    return CONTROL.sub("", text)


class PipelineError(Exit):
    """A failure: ``what`` failed and why, a ``remedy``, and ``details``, the end of a log."""

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        remedy: str,
        details: str = "",
    ) -> None:
        self.what = what
        self.remedy = remedy
        self.details = details
        parts = [details.rstrip(), f"{type(self).__name__}: {what}", f"  -> {remedy}"]
        message = "\n".join(part for part in parts if part)
        super().__init__(printable(message), type(self).exit_code)


class SettingRefused(PipelineError):
    """A setting is unknown or has an invalid value."""

    exit_code = 10


class NoEngine(PipelineError):
    """Neither Podman nor Docker works on this machine."""

    exit_code = 12


class EngineBroken(PipelineError):
    """The engine is installed, but a command of it failed."""

    exit_code = 13


class EngineLost(PipelineError):
    """The engine stopped answering during a command."""

    exit_code = 14


class SetupFailed(PipelineError):
    """``inv setup`` could not install what is missing."""

    exit_code = 15


class ToolMissing(PipelineError):
    """A program or Python package that this task needs is not installed."""

    exit_code = 16


class NotWritable(PipelineError):
    """Permission denied, or the file system is read-only."""

    exit_code = 17


class GitHostUnreachable(PipelineError):
    """The git host does not answer, or the connection broke during a transfer."""

    exit_code = 20


class NoSuchRepository(PipelineError):
    """The git host has no such repository, or access is denied."""

    exit_code = 21


class NoSuchRef(PipelineError):
    """The repository has no such branch, tag or commit."""

    exit_code = 22


class NotOpenAgents(PipelineError):
    """The fetched repository has no agents in ``.opencode/``, or files that cannot be built."""

    exit_code = 23


class LocalEdits(PipelineError):
    """``vendor/OpenAgents`` has local changes that a fetch would overwrite."""

    exit_code = 24


class VendorUnusable(PipelineError):
    """``vendor/`` is read-only, points outside the repository, or is not a directory."""

    exit_code = 25


class DiskFull(PipelineError):
    """No space left on the device."""

    exit_code = 26


class BaseUnavailable(PipelineError):
    """``node:20-slim`` can be neither pulled nor built on this machine."""

    exit_code = 30


class BuildFailed(PipelineError):
    """A step of the Containerfile failed."""

    exit_code = 31


class ContainerfileRefused(PipelineError):
    """The engine cannot parse the Containerfile."""

    exit_code = 32


class ConfigRefused(PipelineError):
    """``config.json`` is not JSON, or has a key that OpenCode does not know."""

    exit_code = 33


class NothingFetched(PipelineError):
    """``vendor/OpenAgents`` is missing or incomplete: run ``inv fetch``."""

    exit_code = 34


class LockBroken(PipelineError):
    """A file in ``locks/`` is missing or invalid, or a download does not match it."""

    exit_code = 35


class ContentsUnreadable(PipelineError):
    """The contents of an image cannot be listed."""

    exit_code = 36


class SbomFailed(PipelineError):
    """syft could not write the SBOM."""

    exit_code = 37


class NotTheSame(PipelineError):
    """The two images differ (``inv diff --same``)."""

    exit_code = 38


class NoSuchImage(PipelineError):
    """There is no such image on this machine."""

    exit_code = 40


class ServerDied(PipelineError):
    """The container exited before the server answered."""

    exit_code = 41


class ServerSilent(PipelineError):
    """The server did not answer ``/config`` with 200 in time."""

    exit_code = 42


class SmokeFailed(PipelineError):
    """One or more probes of the smoke test failed."""

    exit_code = 43


class PortTaken(PipelineError):
    """The port is already in use."""

    exit_code = 44


class ChecksFailed(PipelineError):
    """A linter or a test failed."""

    exit_code = 50


class NightFailed(PipelineError):
    """A nightly run failed; ``latest``, ``previous``, ``locks/`` and ``vendor/`` are unchanged."""

    exit_code = 60


class NightSkipped(PipelineError):
    """A nightly run was skipped: another one runs, no source answers, or a rollback holds."""

    exit_code = 61


class NoSuchRelease(PipelineError):
    """There is no such image to release, roll back to or push."""

    exit_code = 62


class NotReleased(PipelineError):
    """The image passed, but has only the starter package or a known vulnerability."""

    exit_code = 63


class BumpFailed(PipelineError):
    """npm or uv cannot resolve the pins."""

    exit_code = 64


class SourcesUnreachable(PipelineError):
    """None of the package sources answers."""

    exit_code = 65


class NotPinned(PipelineError):
    """An image must be pinned by digest (``REPOSITORY@sha256:...``)."""

    exit_code = 66


class RegistryRefused(PipelineError):
    """The registry denied access or does not have the image."""

    exit_code = 67


class RegistryUnreachable(PipelineError):
    """The registry does not answer, or answers with server errors."""

    exit_code = 68


class ScheduleFailed(PipelineError):
    """crontab is not installed, or the crontab cannot be read or written."""

    exit_code = 69


class StackBusy(PipelineError):
    """Another command is changing this stack."""

    exit_code = 70


class NoStack(PipelineError):
    """The stack, or the requested service, is not running."""

    exit_code = 71


class SecretsRefused(PipelineError):
    """A secrets file is readable by other users or has invalid content."""

    exit_code = 72


class PartDown(PipelineError):
    """A service of the stack exited or did not become ready in time."""

    exit_code = 73


class StackUnwell(PipelineError):
    """The stack is running but not healthy; ``inv status`` lists the problems."""

    exit_code = 74


class ComposeMissing(PipelineError):
    """No Compose implementation is installed for this engine."""

    exit_code = 75


class UpgradeRolledBack(PipelineError):
    """The new image was not healthy; the previous image and its data are running again."""

    exit_code = 76


class UpgradeStopped(PipelineError):
    """The upgrade could not start, or an interrupted one could not be rolled back."""

    exit_code = 77


class DatabaseImageMissing(PipelineError):
    """A database image can be neither pulled nor built."""

    exit_code = 78


class VolumesKept(PipelineError):
    """Refusing to delete volumes without ``--yes``."""

    exit_code = 79


class RestoreStopped(PipelineError):
    """A restore was refused or failed; its output says which data changed."""

    exit_code = 80


class ProjectRefused(PipelineError):
    """The server cannot work in this directory, or the repository cannot be cloned."""

    exit_code = 81


class LoginFailed(PipelineError):
    """OpenCode's log-in failed or was cancelled; nothing was changed."""

    exit_code = 82


class Interrupted(PipelineError):
    """Interrupted by Ctrl-C, SIGTERM or SIGHUP; the exit code is 128 plus the signal number."""

    exit_code = 130

    def __init__(
        self,
        signal_name: str,
        signal_number: int,
    ) -> None:
        super().__init__(f"{signal_name} received", "Run the same command again to continue.")
        self._code = 128 + signal_number


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Turn a full disk, denied access or a program that hangs into a PipelineError."""
    try:
        yield
    except subprocess.TimeoutExpired as error:
        program = " ".join(map(str, error.cmd[:3]))
        raise EngineLost(
            f"{program}: no answer within {error.timeout:g} s", "Check the engine: inv doctor."
        ) from error
    except OSError as error:
        where = error.filename or "the temporary directory"
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskFull(
                f"{where}: no space left on device",
                "Free up space and repeat the command; inv doctor shows the free space.",
            ) from error
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            raise NotWritable(
                f"{where}: {error.strerror}",
                f"Change its owner, for example after a run with sudo: sudo chown $USER {where}",
            ) from error
        raise
