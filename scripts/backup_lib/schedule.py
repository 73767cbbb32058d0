"""Backups on a schedule: cron says when, and this process, which has the environment, does it.

cron starts its jobs without our environment, and to give it to them it would have to be written down. So its jobs only
send a signal to this process. What runs then inherits the environment and writes to the container's log.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

from backup_lib import children
from backup_lib.errors import CronEnded, NotConfigured, ToolMissing
from backup_lib.remote import Remote
from backup_lib.say import say
from backup_lib.settings import Settings

PROGRAM = Path(__file__).parents[1] / "backup"
JOBS = {signal.SIGUSR1: ["run", "--prune"], signal.SIGUSR2: ["status"]}
ROOM = "Look at BACKUP_SCHEDULE; cron needs root, and /var/spool/cron and /run that can be written to."
CAPABILITIES = {"CAP_SETGID": 6, "CAP_SETUID": 7}
HOURLY = "17 * * * *"
END_SECONDS = 25
"""How long a run may clean up when the container is stopped; Kubernetes kills after 30 s."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def crontab(schedule: str, pid: int) -> str:
    """Return the table that cron reads: one line makes a backup, one says hourly how old the newest is."""
    if not re.fullmatch(r"@(hourly|daily|weekly|monthly)|(\S+[ \t]+){4}\S+", schedule):
        raise NotConfigured("BACKUP_SCHEDULE is not a line of cron's", "Write five fields, as in 23 3 * * *.")
    return f"{schedule} kill -USR1 {pid}\n{HOURLY} kill -USR2 {pid}\n"


def missing_capabilities(status: str) -> list[str]:
    """Return what ``/proc/self/status`` says that we lack: without them cron starts nothing, and says nothing."""
    held = int(status.split("CapEff:")[1].split(maxsplit=1)[0], 16)
    return [name for name, bit in CAPABILITIES.items() if not held >> bit & 1]


def serve(settings: Settings) -> None:
    """Run cron and what it asks for, until SIGTERM. Raises NotConfigured, ToolMissing, CronEnded."""
    Remote(settings)  # is there one?
    user = user_of(settings.environ)
    os.dup2(sys.stdout.fileno(), sys.stderr.fileno())  # one log, on stdout
    if lacks := missing_capabilities(Path("/proc/self/status").read_text()):
        raise NotConfigured(
            f"cron cannot start jobs without {', '.join(lacks)}", "Give the container these capabilities."
        )
    environ = {"PATH": PATH, "TZ": settings.environ.get("TZ", "")}
    heard: SimpleQueue[int] = SimpleQueue()
    for number in (*JOBS, signal.SIGCHLD, *children.ENDING):
        signal.signal(number, lambda said, _frame: heard.put(said))
    table = children.run(["crontab", "-"], environ, stdin=crontab(settings.schedule, os.getpid()).encode())
    if table.code:
        raise NotConfigured(f"cron refuses the schedule: {table.stderr}", ROOM)
    with tempfile.TemporaryFile() as log:
        try:
            cron = subprocess.Popen(["cron", "-f"], env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        except FileNotFoundError:
            raise ToolMissing("cron is not installed", "Use the image, or install Debian's package.") from None
        say(f"cron: {settings.schedule}; backups of {', '.join(settings.parts)} to {settings.remote}")
        if _obey(heard, cron, user):
            return
        log.seek(0)
        said = log.read().decode(errors="replace").strip()
        raise CronEnded(f"cron ended with {cron.returncode} {said}", ROOM)


def user_of(environ: Mapping[str, str]) -> tuple[int | None, int | None]:
    """Return who a backup runs as, UID:GID in BACKUP_USER; without it we ourselves, None. Raises NotConfigured.

    It should be the server's user: what is restored then belongs to it, and no capability is needed to read its files.
    """
    said = environ.get("BACKUP_USER", "")
    if not said:
        return None, None
    if not re.fullmatch(r"[0-9]{1,9}:[0-9]{1,9}", said):
        raise NotConfigured(f"BACKUP_USER={said} is no UID:GID", "Write two numbers, as in 1000:1000.")
    user, group = map(int, said.split(":"))
    return user, group


def _obey(heard: SimpleQueue[int], cron: subprocess.Popen[bytes], user: tuple[int | None, int | None]) -> bool:
    """Do what the signals say until one says to stop, or until cron has ended: then return False."""
    job: subprocess.Popen[bytes] | None = None
    try:
        while cron.poll() is None:
            number = heard.get()
            if job and job.poll() is not None:
                job = None
            if number in children.ENDING:
                say("stopping")
                return True
            if number in JOBS:
                job = _begin(job, JOBS[signal.Signals(number)], user)
        return False
    finally:
        for process in filter(None, (job, cron)):
            _end(process)


def _begin(
    job: subprocess.Popen[bytes] | None, words: list[str], user: tuple[int | None, int | None]
) -> subprocess.Popen[bytes]:
    if job:
        say(f"cron: not doing {words[0]}: the one before is still running")
        return job
    say(f"cron: {words[0]}")
    # Both streams go to the container's log; so does a traceback, if there is one.
    return subprocess.Popen(
        [sys.executable, "-IB", PROGRAM, *words],
        stdin=subprocess.DEVNULL,
        stderr=sys.stdout,
        user=user[0],
        group=user[1],
        extra_groups=None if user[0] is None else [],
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
