"""The one subprocess call, with real children."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.core import process
from pipeline.core.errors import Interrupted, ToolMissing
from pipeline.core.settings import ROOT

DEADLINE = 10.0


def ended(pid: int) -> bool:
    """Whether a process is gone, or waits as a zombie for whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until_ended(pid: int) -> None:
    deadline = time.monotonic() + DEADLINE
    while not ended(pid):
        assert time.monotonic() < deadline, f"{pid} still runs"


def test_what_a_child_gets_and_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OURS", "kept")
    script = 'read word; echo "$word $OURS $MORE"; pwd; echo loud >&2; exit 3'
    done = process.run(["sh", "-c", script], stdin=b"hello\n", env={"MORE": "added"}, cwd=tmp_path)
    assert (done.code, done.ok) == (3, False)
    assert done.stdout == f"hello kept added\n{tmp_path}\n"
    assert (done.stderr, done.output) == ("loud\n", "loud")
    assert done.argv[:2] == ("sh", "-c")
    assert 0 < done.seconds < DEADLINE
    quiet = process.run(["cat"])
    assert (quiet.ok, quiet.stdout) == (True, "")  # there is nothing on stdin to wait for
    assert process.run(["sh", "-c", "kill -9 $$"]).code == -9
    assert process.run(["printf", "a\\377b"]).output == "a\N{REPLACEMENT CHARACTER}b"


def test_lines_are_handed_on_as_they_come_and_the_last_are_kept() -> None:
    came: list[tuple[str, float]] = []
    script = "for i in 1 2 3; do echo $i; done; echo err >&2; sleep 0.3; echo end; exit 4"
    done = process.run(
        ["sh", "-c", script], on_line=lambda line: came.append((line, time.monotonic())), tail=2
    )
    assert [line for line, _ in came] == ["1", "2", "3", "err", "end"]
    assert came[4][1] - came[3][1] > 0.2
    assert (done.code, done.stdout, done.stderr) == (4, "err\nend", "")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_timeout_ends_the_child_and_its_children(tmp_path: Path, *, streamed: bool) -> None:
    note = tmp_path / "pid"
    argv = ["sh", "-c", f"sleep 60 & echo $! > {note}; echo said; wait"]
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        process.run(argv, timeout=0.3, on_line=(lambda _: None) if streamed else None)
    assert time.monotonic() - began < DEADLINE / 2
    assert caught.value.timeout == 0.3
    wait_until_ended(int(note.read_text()))


def test_a_child_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "GRACE_SECONDS", 0.1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.run(["sh", "-c", "trap '' TERM; while :; do sleep 60; done"], timeout=0.2)


def test_an_error_of_the_caller_ends_the_child(tmp_path: Path) -> None:
    note = tmp_path / "pid"

    def trip(_line: str) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        process.run(["sh", "-c", f"echo $$ > {note}; echo go; sleep 60"], on_line=trip)
    wait_until_ended(int(note.read_text()))


@pytest.mark.parametrize("reason", ["No such file", "Permission denied", "Exec format error"])
def test_a_program_that_cannot_be_run_is_named(tmp_path: Path, reason: str) -> None:
    program = tmp_path / "tool"
    if reason != "No such file":
        program.write_text("of another architecture")
        program.chmod(0o755 if reason == "Exec format error" else 0o644)
    with pytest.raises(ToolMissing, match=f"{program} cannot be run: {reason}"):
        process.run([str(program)])


def test_what_is_no_fault_of_the_program_is_not_blamed_on_it() -> None:
    with pytest.raises(OSError, match="Argument list too long"):
        process.run(["true", "x" * 3_000_000])


def test_the_command_is_shown_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process, "echo", True)
    process.run(["true", "two words"])
    process.run(["echo", "on the terminal"], terminal=True)
    out, err = capfd.readouterr()
    assert err.splitlines() == ["+ true 'two words'", "+ echo 'on the terminal'"]
    assert out == "on the terminal\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_child_runs_every_finally_and_gives_the_shells_code(
    tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "tasks.py").write_text(
        """
import signal
from invoke import task
from pipeline.core import process

@task
def hang(c):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with process.interruptible():
            try:
                process.run(["sh", "-c", "echo $$; sleep 60"], on_line=lambda line: print(line, flush=True))
            finally:
                signal.raise_signal(signal.SIGTERM)  # a second one, while things are removed
                print("removed", flush=True)
    finally:
        print("as before" if signal.getsignal(signal.SIGTERM) is before else "changed", flush=True)
"""
    )
    parent = subprocess.Popen(
        [sys.executable, "-m", "invoke", "hang"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        parent.send_signal(number)
        out, err = parent.communicate(timeout=DEADLINE)
    assert parent.returncode == 128 + number
    assert out == "removed\nas before\n"
    assert err.startswith(f"Interrupted: {number.name} received\n")
    wait_until_ended(child)


def test_a_signal_waits_for_the_end_of_a_deferring_block() -> None:
    done: list[str] = []

    @process.interruptible()
    def begin_something() -> None:
        try:
            with process.deferred(), process.deferred():
                signal.raise_signal(signal.SIGTERM)
                done.append("begun")
            done.append("not reached")
        finally:
            with (
                process.deferred()
            ):  # a signal that was raised is not raised again while things are removed
                done.append("removed")
            done.append("to the end")

    with pytest.raises(Interrupted) as caught:
        begin_something()
    assert caught.value.code == 128 + signal.SIGTERM
    assert done == ["begun", "removed", "to the end"]


def test_commands_that_other_threads_wait_for_can_be_killed() -> None:
    up = threading.Event()
    stubborn = ["sh", "-c", "trap '' TERM; echo up; sleep 60 & wait"]
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(process.run, stubborn, on_line=lambda _: up.set())
        assert up.wait(DEADLINE)
        process.kill_all()
        assert waiting.result(DEADLINE).code == -signal.SIGKILL
    assert not process._live
