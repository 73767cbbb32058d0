"""The failures of backup, each with an exit code."""

import errno


class Failure(Exception):
    """What failed and why, and ``remedy``: what helps."""

    code = 1

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.remedy = remedy


class NotConfigured(Failure):
    """A variable is missing or invalid."""

    code = 10


class ToolMissing(Failure):
    """rclone is not installed."""

    code = 11


class Busy(Failure):
    """Another backup or restore is running here."""

    code = 12


class DiskFull(Failure):
    """No space is left in the working directory or at the remote."""

    code = 13


class ServerUnreachable(Failure):
    """FalkorDB or Valkey does not answer, or rejects the credentials."""

    code = 20


class CopyCut(Failure):
    """The server or the connection ended during a copy."""

    code = 21


class CopyCorrupt(Failure):
    """A copy is incomplete or damaged."""

    code = 22


class NothingToCopy(Failure):
    """opencode.db does not exist."""

    code = 23


class RemoteUnreachable(Failure):
    """The remote does not answer, or a transfer was cut."""

    code = 30


class RemoteRefused(Failure):
    """The remote rejects the keys, or they lack a permission."""

    code = 31


class RemoteGone(Failure):
    """The bucket or directory of the backups does not exist."""

    code = 32


class WrongPassword(Failure):
    """The backups at the remote have another password, or none."""

    code = 33


class UploadDamaged(Failure):
    """What was read back from the remote differs from what was uploaded."""

    code = 34


class NoSuchBackup(Failure):
    """There is no complete backup with this ID, or none at all."""

    code = 40


class BackupDamaged(Failure):
    """A backup does not match its manifest."""

    code = 41


class TargetNotEmpty(Failure):
    """The target is not empty, and --replace was not given."""

    code = 50


class TargetTooOld(Failure):
    """The target cannot read this backup: loading it would terminate the server."""

    code = 51


class TargetInUse(Failure):
    """The target is a replica, or the database is in use."""

    code = 52


class TargetTooSmall(Failure):
    """The target's maxmemory is smaller than the data."""

    code = 55


class TargetCannotReachUs(Failure):
    """The target could not connect to this container; it is unchanged."""

    code = 56


class RestoreFailed(Failure):
    """The restore failed; the target is as it was before."""

    code = 53


class SafetyCopyNeeded(Failure):
    """The restore failed, and so did putting back the safety backup, which is at the remote."""

    code = 54


class Late(Failure):
    """The newest complete backup is too old, or there is none."""

    code = 60


class LastRunFailed(Failure):
    """The last backup failed."""

    code = 61


class Interrupted(BaseException):
    """A signal; the exit code is 128 plus its number. ``except Exception`` does not catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number


def full_disk(where: str) -> DiskFull:
    """Return the failure to raise for ENOSPC."""
    return DiskFull(
        f"no space is left in {where}", "Free up space, or set BACKUP_WORK_DIR to a larger disk."
    )


def is_full(error: OSError) -> bool:
    """Return whether an error means a full disk or quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
