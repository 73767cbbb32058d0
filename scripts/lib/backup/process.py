"""Run other programs. None outlives this process, and one that makes no progress is killed."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from lib.backup.errors import Interrupted, ToolMissing

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
POLL_SECONDS = 0.2
STDERR_BYTES = 2000

_running: set[subprocess.Popen[bytes]] = set()
_ending = threading.Event()


@dataclass(frozen=True)
class Completed:
    """The exit code of a program, its stdout, and the last 2,000 bytes of its stderr."""

    code: int
    stdout: bytes
    stderr: str


def run(
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    stdin: bytes = b"",
    progress: Callable[[], int] | None = None,
    stall_seconds: float = 60,
) -> Completed:
    """Run a program to its end.

    It is killed when the number that ``progress`` returns stays the same for ``stall_seconds``.
    Raises ToolMissing when there is no such program.
    """
    if not shutil.which(argv[0], path=environ.get("PATH")):
        raise ToolMissing(f"{argv[0]} is not installed", f"Run: apt-get install {argv[0]}")
    with contextlib.ExitStack() as stack:
        given, output, errors = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        given.write(stdin)
        given.seek(0)
        process = subprocess.Popen(
            # The kernel ends it also when this process is killed.
            [
                "setpriv",
                "--pdeathsig",
                "KILL",
                "--",
                *argv,
            ],
            env=environ,
            stdin=given,
            stdout=output,
            stderr=errors,
            process_group=0,
        )
        _running.add(process)
        # It may have been started at the moment of the signal. The main thread cleans up.
        if _ending.is_set() and threading.current_thread() is not threading.main_thread():
            kill(process)
        try:
            wait(process, progress, stall_seconds)
        finally:
            kill(process)
            process.wait()
            _running.discard(process)
        output.seek(0)
        errors.seek(max(errors.seek(0, os.SEEK_END) - STDERR_BYTES, 0))
        stderr = errors.read().decode(errors="replace").strip()
        return Completed(process.returncode, output.read(), stderr)


def wait(
    process: subprocess.Popen[bytes], progress: Callable[[], int] | None, stall_seconds: float
) -> None:
    """Wait for the end of a program, or for the time when it has made no progress for too long."""
    if progress is None:
        process.wait()
        return
    seen, since = progress(), time.monotonic()
    while time.monotonic() - since < stall_seconds:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_SECONDS)
            return
        if (now := progress()) != seen:
            seen, since = now, time.monotonic()


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a program and its children, if it is still running."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Kill the programs and raise Interrupted at the first SIGTERM, SIGINT or SIGHUP.

    Further signals are ignored, so that the clean-up completes.
    """

    def interrupt(number: int, _frame: FrameType | None) -> None:
        for ending in ENDING:
            signal.signal(ending, signal.SIG_IGN)
        _ending.set()
        for process in list(_running):
            kill(process)
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
