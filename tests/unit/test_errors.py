"""Every failure: its code, its words, and docs/exit-codes.md."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from invoke.context import Context

from pipeline.core import errors, process
from pipeline.core.errors import DiskFull, EngineLost, NotWritable, PipelineError
from pipeline.core.settings import ROOT
from pipeline.task_context import settings_of

CLASSES = {
    each.__name__: each
    for each in vars(errors).values()
    if isinstance(each, type) and issubclass(each, PipelineError) and each is not PipelineError
}


def test_codes_are_unique_and_none_is_one_that_something_else_uses() -> None:
    codes = [each.exit_code for each in CLASSES.values()]
    assert len(codes) == len(set(codes)) > 20
    # 1 is Invoke's own and a traceback's, 2 argparse's, 126 and 127 a shell's.
    assert not {0, 1, 2, 126, 127} & set(codes)


def test_the_page_lists_exactly_the_classes_in_the_order_of_their_codes() -> None:
    page = (ROOT / "docs" / "exit-codes.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (.+) \|$", page, re.MULTILINE)
    expected = sorted(
        (each.exit_code, name, str(each.__doc__).replace("``", "`"))
        for name, each in CLASSES.items()
    )
    listed = [(int(code), name, words) for code, name, words in rows]
    assert listed == [(code, name, words.partition("\n")[0]) for code, name, words in expected]


@pytest.mark.parametrize("details", ["", "line one\nline two\n"])
def test_invoke_prints_the_message_on_stderr_and_leaves_with_the_code(
    tmp_path: Path, details: str
) -> None:
    (tmp_path / "tasks.py").write_text(
        "from invoke import task\nfrom pipeline.core.errors import NoEngine\n"
        f"@task\ndef boom(c):\n    raise NoEngine('nothing answers', 'Start one.', {details!r})\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "invoke", "boom"]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (12, "")
    assert done.stderr == f"{details}NoEngine: nothing answers\n  -> Start one.\n"


def test_an_interruption_has_the_shells_code_for_its_signal() -> None:
    assert errors.Interrupted("SIGTERM", 15).code == 143
    assert errors.Interrupted("SIGINT", 2).code == errors.Interrupted.exit_code == 130


def test_the_launchers_own_code_is_on_the_page_and_is_no_class() -> None:
    assert "exit 11;" in (ROOT / "inv").read_text()
    assert re.search(
        r"^11 is the exit code of the launcher",
        (ROOT / "docs" / "exit-codes.md").read_text(),
        re.MULTILINE,
    )
    assert 11 not in [each.exit_code for each in CLASSES.values()]


@pytest.mark.parametrize(
    ("number", "failure", "words"),
    [
        (errno.ENOSPC, DiskFull, "/somewhere: no space left on device"),
        (errno.EDQUOT, DiskFull, "/somewhere: no space left on device"),
        (errno.EACCES, NotWritable, "/somewhere: Permission denied"),
        (errno.EPERM, NotWritable, "/somewhere: Operation not permitted"),
        (errno.EROFS, NotWritable, "/somewhere: Read-only file system"),
    ],
)
def test_what_any_step_can_meet_has_a_name(
    number: int, failure: type[PipelineError], words: str
) -> None:
    trouble = OSError(number, os.strerror(number), "/somewhere")
    with pytest.raises(failure) as caught, errors.named():
        raise trouble
    assert caught.value.what == words
    assert caught.value.__cause__ is trouble


def test_a_full_disk_is_named_even_where_no_file_is() -> None:
    with pytest.raises(DiskFull, match="the temporary directory: no space left"), errors.named():
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_program_that_hangs_is_named_by_its_first_words() -> None:
    with pytest.raises(EngineLost) as caught, errors.named():
        process.run(["sh", "-c", "sleep 60; true", "secret"], timeout=0.1)
    assert caught.value.what == "sh -c sleep 60; true: no answer within 0.1 s"
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "trouble", [FileNotFoundError(errno.ENOENT, "gone", "/x"), KeyError("a defect")]
)
def test_what_has_no_name_is_left_as_it_is(trouble: Exception) -> None:
    with pytest.raises(type(trouble)) as caught, errors.named():
        raise trouble
    assert caught.value is trouble


def test_every_task_names_what_its_steps_meet() -> None:
    with pytest.raises(NotWritable, match="/somewhere"), settings_of(Context()):
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere")
