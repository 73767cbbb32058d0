"""The one subprocess call: an argv in, what it said and how long it took out."""

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

from pipeline.errors import Interrupted, ToolMissing

GRACE_SECONDS = 10.0
"""How long a child may take to end after SIGTERM before it is killed."""

NOT_A_PROGRAM = (errno.ENOENT, errno.EACCES, errno.ENOEXEC)
"""Not there, not ours to run, or of another architecture."""

_live: set[subprocess.Popen[bytes]] = set()
"""The children that some thread waits for, each leader of a process group of its own."""

echo = False
"""Whether each command is printed on stderr first; ``inv -e`` sets it."""


@dataclass(frozen=True)
class Completed:
    """A finished command: ``code`` is its exit code, negative for a signal; ``seconds`` is wall time."""

    argv: tuple[str, ...]
    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether it ended with 0."""
        return self.code == 0

    @property
    def said(self) -> str:
        """The last thing it said, stderr first: what an error message quotes."""
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
    """Run ``argv`` to its end; never raises for an exit code.

    ``on_line`` gets each line of stdout and stderr together as it comes; then ``stdout`` keeps the last ``tail``
    lines. Without it both are captured whole. ``env`` is added to ours. The child gets a process group of its own,
    so that Ctrl-C reaches it only through us; ``terminal`` leaves it in ours and lets it talk to the terminal itself
    (sudo asks for a password there). Whatever ends this call early ends the child and its group first.

    Raises ToolMissing when there is no such program, and subprocess.TimeoutExpired after ``timeout`` seconds.
    """
    if echo:
        print(f"+ {shlex.join(argv)}", file=sys.stderr, flush=True)
    began = time.monotonic()
    piped = None if terminal else subprocess.PIPE
    try:
        child = subprocess.Popen(
            argv,
            stdin=None if terminal else subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=piped,
            stderr=subprocess.STDOUT if on_line else piped,
            env={**os.environ, **env} if env else None,
            cwd=cwd,
            process_group=None if terminal else 0,
        )
    except OSError as error:
        if error.errno not in NOT_A_PROGRAM:
            raise
        raise ToolMissing(
            f"{argv[0]} cannot be run: {error.strerror}", f"Install {argv[0]}, or put it on PATH."
        ) from error
    if not terminal:
        _live.add(child)
    try:
        if on_line:
            stdout, stderr = _follow(child, on_line, timeout, tail), ""
        else:
            out, err = child.communicate(stdin, timeout=timeout)
            stdout, stderr = (out or b"").decode(errors="replace"), (err or b"").decode(errors="replace")
    except BaseException:
        _end(child, group=not terminal)
        raise
    finally:
        _live.discard(child)
    return Completed(tuple(argv), child.returncode, stdout, stderr, time.monotonic() - began)


def _follow(child: subprocess.Popen[bytes], on_line: Callable[[str], None], timeout: float | None, tail: int) -> str:
    last: deque[str] = deque(maxlen=tail)
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        _signal(child, signal.SIGKILL, group=True)

    timer = threading.Timer(timeout, expire) if timeout else None
    if timer:
        timer.daemon = True
        timer.start()
    try:
        assert child.stdout is not None  # noqa: S101 -- Popen was told to pipe it
        for raw in child.stdout:
            line = raw.decode(errors="replace").rstrip()
            last.append(line)
            on_line(line)
        child.wait()
    finally:
        if timer:
            timer.cancel()
        if child.stdout:
            child.stdout.close()
    if expired.is_set():
        raise subprocess.TimeoutExpired(child.args, timeout or 0, "\n".join(last))
    return "\n".join(last)


def _signal(child: subprocess.Popen[bytes], number: int, *, group: bool) -> None:
    with contextlib.suppress(ProcessLookupError):
        if group:
            os.killpg(child.pid, number)
        else:
            child.send_signal(number)


def _end(child: subprocess.Popen[bytes], *, group: bool) -> None:
    _signal(child, signal.SIGTERM, group=group)
    try:
        child.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        _signal(child, signal.SIGKILL, group=group)
        child.wait()
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe:
            pipe.close()


def kill_all() -> None:
    """Kill every command that other threads wait for; each of those waits then ends with a negative code."""
    for child in list(_live):
        _signal(child, signal.SIGKILL, group=True)


_received: list[int] = []
"""The signal that ends this command, once it has come."""

_blocks: list[None] = []
"""One entry for each ``deferred`` block that the main thread is in: signals are handled in no other."""


class _Signalled(BaseException):
    """A signal on its way out: no ``except Exception`` of a library may keep it, as one in requests' cookies would."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into ``Interrupted``, so that every ``finally`` and ``with`` runs first.

    A second signal while those run is ignored: they are bounded, and what they remove must be removed.
    """
    _received.clear()

    def interrupt(number: int, _frame: FrameType | None) -> None:
        _received.append(number)
        for each in handled:
            signal.signal(each, signal.SIG_IGN)
        if not _blocks:
            raise _Signalled

    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in handled}
    try:
        with contextlib.suppress(_Signalled):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    # Also where the exception was lost on its way, as one that is raised while an object is being deleted is.
    if _received:
        raise Interrupted(signal.Signals(_received[0]).name, _received[0])


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let a signal wait for the end of this short block: what is begun in it must be in somebody's hands by then."""
    already = len(_received)
    _blocks.append(None)
    try:
        yield
    finally:
        _blocks.pop()
    if len(_received) > already and not _blocks:
        raise _Signalled
