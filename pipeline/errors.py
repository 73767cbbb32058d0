"""Every failure a user can meet: a name, an exit code, and what to do next.

They are Invoke's ``Exit``: Invoke prints the message on stderr and leaves with the code.
"""

from __future__ import annotations

import contextlib
import errno
import subprocess
from collections.abc import Iterator
from typing import ClassVar

from invoke.exceptions import Exit


class PipelineError(Exit):
    """A failure with a remedy: ``what`` happened, the ``remedy``, and optional ``details`` (last lines of a log)."""

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, remedy: str, details: str = "") -> None:
        self.what = what
        self.remedy = remedy
        self.details = details
        parts = [details.rstrip(), f"{type(self).__name__}: {what}", f"  -> {remedy}"]
        super().__init__("\n".join(part for part in parts if part), type(self).exit_code)


class SettingRefused(PipelineError):
    """A setting is unknown, or its value is impossible."""

    exit_code = 10


class NoEngine(PipelineError):
    """Neither podman nor docker answers on this machine."""

    exit_code = 12


class EngineBroken(PipelineError):
    """An engine is there but cannot run a container."""

    exit_code = 13


class EngineLost(PipelineError):
    """The engine went away in the middle of its work."""

    exit_code = 14


class SetupFailed(PipelineError):
    """What this machine lacks could not be installed."""

    exit_code = 15


class ToolMissing(PipelineError):
    """A program or Python package that this task needs is not installed."""

    exit_code = 16


class NotWritable(PipelineError):
    """A file or directory that the tasks write is not ours to write."""

    exit_code = 17


class GitHostUnreachable(PipelineError):
    """The git host does not answer, or stopped answering in the middle of a transfer."""

    exit_code = 20


class NoSuchRepository(PipelineError):
    """The host answers, and has no such repository, or not for us."""

    exit_code = 21


class NoSuchRef(PipelineError):
    """The repository has no such branch, tag or commit."""

    exit_code = 22


class NotOpenAgents(PipelineError):
    """What was fetched has no ``.opencode/`` with agents in it."""

    exit_code = 23


class LocalEdits(PipelineError):
    """``vendor/OpenAgents`` holds edits that a fetch would throw away."""

    exit_code = 24


class VendorUnusable(PipelineError):
    """``vendor/`` is read-only, leads out of the repository, or is not a directory."""

    exit_code = 25


class DiskFull(PipelineError):
    """No space is left where the work is done."""

    exit_code = 26


class BaseUnavailable(PipelineError):
    """``node:20-slim`` can be neither pulled nor made here."""

    exit_code = 30


class BuildFailed(PipelineError):
    """A step of the Containerfile failed."""

    exit_code = 31


class ContainerfileRefused(PipelineError):
    """The engine cannot read the Containerfile."""

    exit_code = 32


class ConfigRefused(PipelineError):
    """``config.json`` is not JSON, or has a key OpenCode does not know."""

    exit_code = 33


class NothingFetched(PipelineError):
    """``vendor/OpenAgents`` is missing or half there."""

    exit_code = 34


class LockBroken(PipelineError):
    """A file in ``locks/`` is missing or does not say what it must, or a download does not match it."""

    exit_code = 35


class ContentsUnreadable(PipelineError):
    """An image cannot be looked into: it has no Python of Debian's, or cannot be started."""

    exit_code = 36


class SbomFailed(PipelineError):
    """syft could not write the bill of materials."""

    exit_code = 37


class NotTheSame(PipelineError):
    """Two images that should be the same differ."""

    exit_code = 38


class NoSuchImage(PipelineError):
    """The image that was named is not on this machine."""

    exit_code = 40


class ServerDied(PipelineError):
    """The container started and ended before it answered."""

    exit_code = 41


class ServerSilent(PipelineError):
    """The server does not answer ``/config`` with 200 within the deadline."""

    exit_code = 42


class SmokeFailed(PipelineError):
    """One or more probes failed."""

    exit_code = 43


class PortTaken(PipelineError):
    """The port asked for is in use."""

    exit_code = 44


class ChecksFailed(PipelineError):
    """Lint or tests found something."""

    exit_code = 50


class NightFailed(PipelineError):
    """A night ended in a failure; ``latest``, ``previous``, ``locks/`` and ``vendor/`` are as they were."""

    exit_code = 60


class NightSkipped(PipelineError):
    """A night had nothing to do that it may: another is at work, no source answers, it was rolled back."""

    exit_code = 61


class NoSuchRelease(PipelineError):
    """There is no image of that name to release, to go back to, or to push."""

    exit_code = 62


class NotReleased(PipelineError):
    """The image passed, and may not become ``latest``: the starter never takes the place of OpenAgents."""

    exit_code = 63


class BumpFailed(PipelineError):
    """npm or uv cannot resolve the pins: their constraints contradict each other, or a package is gone."""

    exit_code = 64


class SourcesUnreachable(PipelineError):
    """Not one source of the pins answers."""

    exit_code = 65


class NotPinned(PipelineError):
    """An image was to be pulled by a name that can come to mean another image."""

    exit_code = 66


class RegistryRefused(PipelineError):
    """The registry answers, and does not let us in, or does not have the image."""

    exit_code = 67


class RegistryUnreachable(PipelineError):
    """The registry does not answer, or only with faults of its own."""

    exit_code = 68


class ScheduleFailed(PipelineError):
    """The schedule cannot be read or written: no cron, no systemd, or not for this user."""

    exit_code = 69


class StackBusy(PipelineError):
    """Another command is starting, ending or upgrading this stack."""

    exit_code = 70


class NoStack(PipelineError):
    """The stack, or the part of it that was asked for, is not up."""

    exit_code = 71


class SecretsRefused(PipelineError):
    """A file of the stack's secrets can be read by others, or holds what its readers would not agree on."""

    exit_code = 72


class PartDown(PipelineError):
    """A part of the stack ended, or did not answer in time."""

    exit_code = 73


class StackUnwell(PipelineError):
    """The stack is up, and something about it is not as it should be."""

    exit_code = 74


class ComposeMissing(PipelineError):
    """docker is there without Compose."""

    exit_code = 75


class UpgradeRolledBack(PipelineError):
    """The newer image did not come up healthy; the stack runs the one before, with its data."""

    exit_code = 76


class UpgradeStopped(PipelineError):
    """The upgrade could not begin, or an interrupted one could not be undone."""

    exit_code = 77


class DatabaseImageMissing(PipelineError):
    """A database's image can neither be pulled nor made."""

    exit_code = 78


class VolumesKept(PipelineError):
    """The volumes were to be removed, and nobody said yes."""

    exit_code = 79


class RestoreStopped(PipelineError):
    """A restore of the stack was refused or failed; the backup's own words say what is as it was."""

    exit_code = 80


class Interrupted(PipelineError):
    """Ctrl-C or SIGTERM; exit code 128 + the signal's number, as a shell would report it."""

    exit_code = 130

    def __init__(self, signal_name: str, signal_number: int) -> None:
        super().__init__(f"{signal_name} received", "Nothing was left running; the same command may be run again.")
        self._code = 128 + signal_number


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Turn what any step can meet, a full disk or a program that hangs, into a failure with a name."""
    try:
        yield
    except subprocess.TimeoutExpired as error:
        program = " ".join(map(str, error.cmd[:3]))
        raise EngineLost(f"{program} has not answered within {error.timeout:g} s", "Is it well? inv doctor.") from error
    except OSError as error:
        where = error.filename or "the disk"
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskFull(f"no space is left for {where}", "Make room, and repeat; inv doctor says where.") from error
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            remedy = "Give it to this user (a run with sudo may have made it), or work in a checkout of your own."
            raise NotWritable(f"{where}: {error.strerror}", remedy) from error
        raise
