"""Run other programs, none of which outlives this process, and end at a signal."""

import contextlib
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from threading import Event
from types import FrameType

from lib.backup.errors import Interrupted, ToolMissing

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ending = Event()
"""Set at the first signal."""


def run(
    argv: Sequence[str], environ: Mapping[str, str], stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end, or kill it at a signal. Raises ToolMissing if there is none."""
    if not shutil.which(argv[0], path=environ.get("PATH")):
        raise ToolMissing(f"{argv[0]} is not installed", f"Run: apt-get install {argv[0]}")
    # The kernel ends it also when this process is killed.
    command = ("setpriv", "--pdeathsig", "KILL", "--", *argv)
    return subprocess.run(command, env=environ, input=stdin, capture_output=True, check=False)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted at the first SIGTERM, SIGINT or SIGHUP; ``run`` then kills its program.

    Further signals are ignored, so that the clean-up completes.
    """

    def interrupt(number: int, _frame: FrameType | None) -> None:
        for each in ENDING:
            signal.signal(each, signal.SIG_IGN)
        ending.set()
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
