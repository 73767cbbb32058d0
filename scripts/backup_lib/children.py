"""Programs that we run: none outlives us, and one that hangs is ended."""

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
from typing import IO

from backup_lib.errors import Interrupted, ToolMissing

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_live: set[subprocess.Popen[bytes]] = set()
_ending = threading.Event()


@dataclass(frozen=True)
class Done:
    """What a program left: its exit code, what it wrote to stdout, and the end of what it wrote to stderr."""

    code: int
    stdout: bytes
    stderr: str


@contextlib.contextmanager
def child(argv: Sequence[str], environ: Mapping[str, str], *, stdin: IO[bytes] | None = None) -> Iterator[
    tuple[subprocess.Popen[bytes], IO[bytes]]
]:  # fmt: skip
    """Start a program in a group of its own; yield it and its stderr; it has ended when this has.

    Raises ToolMissing when there is no such program.
    """
    if not shutil.which(argv[0], path=environ.get("PATH")):
        raise ToolMissing(f"{argv[0]} is not installed", "Use the image, or install Debian's package.")
    with tempfile.TemporaryFile() as errors:
        words = ["setpriv", "--pdeathsig", "KILL", "--", *argv]  # so that it ends even when we are killed
        process = subprocess.Popen(
            words, env=environ, stdin=stdin or subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
            process_group=0,
        )  # fmt: skip
        _live.add(process)
        if _ending.is_set() and threading.current_thread() is not threading.main_thread():
            _kill(process)  # it was begun in the moment of the signal; what cleans up runs in the main thread
        try:
            yield process, errors
        finally:
            _kill(process)
            process.wait()
            _live.discard(process)
            if process.stdout:
                process.stdout.close()


def run(
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    stdin: bytes = b"",
    moves: Callable[[], int] | None = None,
    stall_seconds: float = 60,
) -> Done:
    """Run a program to its end. It is ended when the number that ``moves`` returns stays the same for so long."""
    with tempfile.TemporaryFile() as given:
        given.write(stdin)
        given.seek(0)
        with child(argv, environ, stdin=given) as (process, errors):
            if moves:
                _watch(process, moves, stall_seconds)
            stdout = process.stdout.read() if process.stdout else b""
            code = process.wait()
            return Done(code, stdout, tail(errors))


def tail(errors: IO[bytes]) -> str:
    """Return the last 2,000 bytes that a program wrote to stderr."""
    errors.seek(max(errors.seek(0, os.SEEK_END) - 2000, 0))
    return errors.read().decode(errors="replace").strip()


def _watch(process: subprocess.Popen[bytes], moves: Callable[[], int], stall_seconds: float) -> None:
    seen, since = moves(), time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
            return
        if (now := moves()) != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > stall_seconds:
            _kill(process)
            return


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Have SIGTERM, SIGINT and SIGHUP end our children and raise Interrupted, once: what follows is cleaning up."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        for ending in ENDING:
            signal.signal(ending, signal.SIG_IGN)
        _ending.set()
        for process in list(_live):
            _kill(process)
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
