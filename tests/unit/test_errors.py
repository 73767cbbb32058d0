"""Every failure: its code, its words, and docs/exit-codes.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import errors
from pipeline.errors import PipelineError
from pipeline.settings import ROOT

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
    expected = sorted((each.exit_code, name, str(each.__doc__).replace("``", "`")) for name, each in CLASSES.items())
    listed = [(int(code), name, words) for code, name, words in rows]
    assert listed == [(code, name, words.partition("\n")[0]) for code, name, words in expected]


@pytest.mark.parametrize("details", ["", "line one\nline two\n"])
def test_invoke_prints_the_message_on_stderr_and_leaves_with_the_code(tmp_path: Path, details: str) -> None:
    (tmp_path / "tasks.py").write_text(
        "from invoke import task\nfrom pipeline.errors import NoEngine\n"
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
