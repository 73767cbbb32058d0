"""Every failure that a user can meet: a name, an exit code of its own, what happened, and what to do next."""

import errno


class Failure(Exception):
    """What happened, in ``args[0]``, and ``remedy``: what to do next."""

    code = 1

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.remedy = remedy


class NotConfigured(Failure):
    """A variable is missing, or its value is impossible."""

    code = 10


class ToolMissing(Failure):
    """rclone, redis-cli, cron or tini is not installed here."""

    code = 11


class Busy(Failure):
    """Another backup or restore is under way here."""

    code = 12


class DiskFull(Failure):
    """No space is left in the working directory, or at a remote that is a disk."""

    code = 13


class ServerUnreachable(Failure):
    """FalkorDB or Valkey does not answer, or does not let us in."""

    code = 20


class CopyCut(Failure):
    """The server, or the connection to it, went away in the middle of a copy."""

    code = 21


class CopyCorrupt(Failure):
    """A copy was made, and its own check says that it is not whole."""

    code = 22


class NothingToCopy(Failure):
    """There is no opencode.db where it should be."""

    code = 23


class RemoteUnreachable(Failure):
    """The remote does not answer, or gave up in the middle of a transfer."""

    code = 30


class RemoteRefused(Failure):
    """The remote does not accept our keys, or does not let them do this."""

    code = 31


class RemoteGone(Failure):
    """The bucket or directory of the backups does not exist."""

    code = 32


class WrongPassword(Failure):
    """The backups at the remote are encrypted with another password, or are not encrypted."""

    code = 33


class UploadDamaged(Failure):
    """What was read back from the remote is not what was sent."""

    code = 34


class NoSuchBackup(Failure):
    """There is no complete backup of that name, or none at all."""

    code = 40


class BackupDamaged(Failure):
    """A backup is not what its manifest says."""

    code = 41


class TargetNotEmpty(Failure):
    """The target holds something, and ``--replace`` was not given."""

    code = 50


class TargetTooOld(Failure):
    """The target cannot read this backup: loading it would end the server."""

    code = 51


class TargetInUse(Failure):
    """The target is a replica, or somebody has the database open."""

    code = 52


class TargetTooSmall(Failure):
    """The target's maxmemory is less than what was copied: it would throw data away."""

    code = 55


class TargetCannotReachUs(Failure):
    """The target could not connect to us to fetch the data; nothing was sent, so it holds what it held."""

    code = 56


class RestoreFailed(Failure):
    """The restore failed; the target is as it was before."""

    code = 53


class SafetyCopyNeeded(Failure):
    """The restore failed, and so did putting the safety copy back: it is at the remote."""

    code = 54


class Late(Failure):
    """The newest complete backup is older than it may be, or there is none."""

    code = 60


class LastRunFailed(Failure):
    """The last backup that was tried here failed."""

    code = 61


class CronEnded(Failure):
    """cron could not start, or ended by itself."""

    code = 62


class Interrupted(BaseException):
    """A signal; the exit code is 128 and its number. No ``except Exception`` keeps it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number


def full_disk(where: str) -> DiskFull:
    """Return the failure to raise for ENOSPC."""
    return DiskFull(f"no space is left in {where}", "Free some, or set BACKUP_WORK_DIR to a larger disk.")


def is_full(error: OSError) -> bool:
    """Say whether it is the disk, or a quota on it."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
