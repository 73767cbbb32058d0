"""The one call that runs a program, and how signals end it."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from pipeline.core.errors import Interrupted, ToolMissing

GRACE_SECONDS = 10.0
"""How long a child may take to end after SIGTERM before it is killed."""

CANNOT_RUN = (errno.ENOENT, errno.EACCES, errno.ENOEXEC)
"""Not found, not executable, or built for another architecture."""

_live: set[subprocess.Popen[bytes]] = set()
"""Running children, each the leader of its own process group."""

echo = False
"""Whether each command is printed on stderr first; ``inv -e`` sets it."""


@dataclass(frozen=True)
class Completed:
    """A finished command. ``code`` is negative for a signal; ``seconds`` is wall time."""

    argv: tuple[str, ...]
    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the exit code is 0."""
        return self.code == 0

    @property
    def output(self) -> str:
        """The end of stderr, or of stdout where stderr is empty: what an error message quotes."""
        return (self.stderr.strip() or self.stdout.strip())[-4000:]


def run(
    argv: Sequence[str],
    *,
    on_line: Callable[[str], None] | None = None,
    timeout: float | None = None,
    stdin: bytes | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    terminal: bool = False,
    tail: int = 200,
) -> Completed:
    """Run ``argv`` and wait for it. An exit code other than 0 raises nothing.

    ``on_line`` is called with each line of stdout and stderr together; ``stdout`` of the result
    then holds the last ``tail`` lines. Otherwise both are captured. ``env`` is added to the
    environment. ``terminal``: the child uses our terminal, for example for a password of sudo, and
    nothing is captured. Otherwise it leads its own process group, so that Ctrl-C reaches only us;
    whatever ends this call early ends the whole group.

    Raises ToolMissing if ``argv[0]`` cannot be run.
    Raises subprocess.TimeoutExpired after ``timeout`` seconds.
    """
    if echo:
        print(f"+ {shlex.join(argv)}", file=sys.stderr, flush=True)
    began = time.monotonic()
    pipe = None if terminal else subprocess.PIPE
    try:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL if stdin is None and not terminal else pipe,
            stdout=pipe,
            stderr=subprocess.STDOUT if on_line else pipe,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            process_group=None if terminal else 0,
        )
    except OSError as error:
        if error.errno not in CANNOT_RUN:
            raise
        raise ToolMissing(
            f"{argv[0]} cannot be run: {error.strerror}", f"Install {argv[0]} or add it to PATH."
        ) from error
    if not terminal:
        _live.add(child)
    try:
        if on_line:
            outputs: tuple[bytes | None, ...] = _follow(child, on_line, timeout, tail), None
        else:
            outputs = child.communicate(stdin, timeout=timeout)
    except BaseException:
        _end(child)
        raise
    finally:
        _live.discard(child)
    stdout, stderr = ((output or b"").decode(errors="replace") for output in outputs)
    return Completed(tuple(argv), child.returncode, stdout, stderr, time.monotonic() - began)


def _follow(
    child: subprocess.Popen[bytes],
    on_line: Callable[[str], None],
    timeout: float | None,
    tail: int,
) -> bytes:
    """Call ``on_line`` with each line as it comes; return the last ``tail`` lines."""
    last: deque[bytes] = deque(maxlen=tail)
    timer = threading.Timer(timeout or threading.TIMEOUT_MAX, _signal, (child, signal.SIGKILL))
    timer.daemon = True
    timer.start()
    try:
        for line in child.stdout or ():
            last.append(line.rstrip())
            on_line(last[-1].decode(errors="replace"))
        child.wait()
        if child.stdout:
            child.stdout.close()
    finally:
        expired = not timer.is_alive()
        timer.cancel()
    if expired:
        raise subprocess.TimeoutExpired(child.args, timeout or 0)
    return b"\n".join(last)


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a child and its process group, unless the group is ours."""
    with contextlib.suppress(ProcessLookupError):
        if child in _live:
            os.killpg(child.pid, number)
        else:
            child.send_signal(number)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a child: SIGTERM, then SIGKILL. Popen's context closes the pipes."""
    with child:
        _signal(child, signal.SIGTERM)
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            _signal(child, signal.SIGKILL)


def kill_all() -> None:
    """Kill the commands that other threads wait for; their exit codes are negative."""
    for child in list(_live):
        _signal(child, signal.SIGKILL)


_received: list[int] = []
"""The signal that ends this command."""

_deferring: list[None] = []
"""One entry for each active ``deferred`` block of the main thread, which handles the signals."""


class _Signalled(BaseException):
    """A signal was received. Not an Exception: libraries such as requests catch those."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into ``Interrupted`` after every ``finally`` block has run.

    Further signals are ignored, so that the clean-up completes.
    """
    _received.clear()

    def interrupt(number: int, _frame: FrameType | None) -> None:
        _received.append(number)
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        if not _deferring:
            raise _Signalled

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.signal(number, interrupt) for number in signals}
    try:
        with contextlib.suppress(_Signalled):
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    # Python discards an exception that is raised while an object is being deleted.
    if _received:
        raise Interrupted(signal.Signals(_received[0]).name, _received[0])


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Delay a signal until the end of this short block, which must not be interrupted half-way."""
    before = len(_received)
    _deferring.append(None)
    try:
        yield
    finally:
        _deferring.pop()
    if len(_received) > before and not _deferring:
        raise _Signalled
