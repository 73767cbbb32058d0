"""Lint and tests: which calls are made, and what a finding gets."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import process
from pipeline.core.errors import ChecksFailed
from pipeline.core.settings import ROOT
from pipeline.host import checks, setup

Finding = Callable[[str], list[list[str]]]


@pytest.fixture
def finding(monkeypatch: pytest.MonkeyPatch) -> Finding:
    """Let the tool whose call holds a word find something; return the calls that are made."""
    calls: list[list[str]] = []
    monkeypatch.setattr(checks, "ensure_dev_tools", lambda: None)
    monkeypatch.setattr(setup, "setup", lambda *_, **options: calls.append(["setup", *options]))

    def use(word: str) -> list[list[str]]:
        def run(argv: list[str], **options: Any) -> process.Completed:
            assert options["cwd"] == ROOT
            calls.append(argv)
            found = bool(word) and any(word in part for part in argv)
            return process.Completed(
                tuple(argv), int(found), "E501 here\n" if found else "", "", 0.1
            )

        monkeypatch.setattr(process, "run", run)
        return calls

    return use


def test_the_calls_of_the_linters() -> None:
    python = [sys.executable, "-m"]
    assert checks.lint_argvs(Path(sys.executable).parent) == {
        "ruff check": [*python, "ruff", "check", "--quiet", "."],
        "ruff format": [*python, "ruff", "format", "--quiet", "--diff", "."],
        "mypy --strict": [*python, "mypy"],
        "hadolint": [
            str(Path(sys.executable).with_name("hadolint")),
            "--no-color",
            "Containerfile",
            "deploy/databases/Containerfile",
        ],
        "shellcheck": [str(Path(sys.executable).with_name("shellcheck")), *checks.shell_scripts()],
    }


def test_every_shell_script_is_checked() -> None:
    scripts = checks.shell_scripts()
    assert {"inv", ".ci/run", "scripts/health", "build_scripts/trim.sh"} <= set(scripts)
    assert "scripts/status" not in scripts
    assert checks.lint_argvs(Path("/bin"))["shellcheck"][1:] == scripts


def test_a_finding_is_printed_and_its_linter_named(
    finding: Finding, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = finding("hadolint")
    with pytest.raises(ChecksFailed, match="hadolint failed"):
        checks.lint()
    assert len(calls) == 5
    out = capsys.readouterr().out
    assert "E501 here" in out
    assert "FAIL  hadolint" in out
    assert out.count("ok    ") == 4
    finding("")
    checks.lint()


def test_tests_run_after_lint_and_only_units_need_no_engine(finding: Finding) -> None:
    calls = finding("")
    checks.test(unit=True, keyword="engine")
    assert calls[-1] == [sys.executable, "-m", "pytest", "tests/unit", "-k", "engine"]
    assert ["setup", "tests"] not in calls
    checks.test()
    parallel = ["--numprocesses", "3", "--dist", "loadscope"]
    assert calls[-2:] == [["setup", "tests"], [sys.executable, "-m", "pytest", *parallel]]
    finding("pytest")
    with pytest.raises(ChecksFailed, match="pytest exited with 1"):
        checks.test(unit=True)
    finding("shellcheck")
    with pytest.raises(ChecksFailed, match="shellcheck failed"):
        checks.test(unit=True)
