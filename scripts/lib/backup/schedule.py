"""Run backups on a schedule, in the foreground: the entrypoint of the backup service."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from threading import Event

from croniter import croniter

from lib.backup.console import log
from lib.backup.errors import NotConfigured
from lib.backup.process import ENDING
from lib.backup.remote import Remote
from lib.backup.settings import Settings

PROGRAM = Path(__file__).parents[2] / "backup"
STATUS_SCHEDULE = "17 * * * *"
WAIT_SECONDS = 60.0
END_SECONDS = 25
"""How long a backup may clean up when the container stops. Kubernetes kills after 30 s."""


def check(schedule: str) -> str:
    """Return ``schedule`` if it is valid: five fields, or @daily. Raises NotConfigured."""
    named = schedule in (
        "@hourly",
        "@daily",
        "@weekly",
        "@monthly",
    )
    if not named and (len(schedule.split()) != 5 or not croniter.is_valid(schedule)):  # noqa: PLR2004
        raise NotConfigured(
            f"invalid configuration: BACKUP_SCHEDULE={schedule}",
            "Set five fields as in crontab(5), for example 23 3 * * *.",
        )
    return schedule


def next_job(schedule: str, now: datetime) -> tuple[datetime, list[str]]:
    """Return the local time of the next job after ``now``, and the arguments of ``backup``."""
    jobs = ((schedule, ["run", "--prune"]), (STATUS_SCHEDULE, ["status"]))
    due = [(croniter(when, now).get_next(datetime), words) for when, words in jobs]
    return min(due, key=lambda job: job[0])


def serve(settings: Settings) -> None:
    """Run each job when it is due, one at a time, until SIGTERM. Raises NotConfigured.

    A job that is due while another one runs is skipped. No variable is written down: a job
    inherits the environment, and its output goes to the container's log.
    """
    Remote(settings)
    schedule = check(settings.schedule)
    os.dup2(sys.stdout.fileno(), sys.stderr.fileno())
    stop = Event()
    for number in ENDING:
        signal.signal(number, lambda _number, _frame: stop.set())
    log(f"schedule {schedule}: backups of {', '.join(settings.parts)} to {settings.remote}")
    while not stop.is_set():
        due, words = next_job(schedule, local_time())
        # In short steps, since the clock may be changed meanwhile.
        while not stop.is_set() and (left := (due - local_time()).total_seconds()) > 0:
            stop.wait(min(left, WAIT_SECONDS))
        if not stop.is_set():
            run_job(words, stop)
    log("stopping")


def local_time() -> datetime:
    """Return the time in the time zone TZ, without an offset, as cron compares it."""
    return datetime.now()  # noqa: DTZ005


def run_job(words: list[str], stop: Event) -> None:
    """Run ``backup`` to its end, or end it when ``stop`` is set."""
    log(f"schedule: {' '.join(words)}")
    job = subprocess.Popen(
        [
            sys.executable,
            "-IB",
            PROGRAM,
            *words,
        ],
        stdin=subprocess.DEVNULL,
        stderr=sys.stdout,
    )
    while job.poll() is None and not stop.wait(0.5):
        pass
    with suppress(ProcessLookupError):
        if job.poll() is None:
            job.terminate()
    try:
        job.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        job.kill()
        job.wait()
