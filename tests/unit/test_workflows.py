"""The workflows for GitHub in deploy/github: their shell, and that the tasks they call exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from invoke.collection import Collection
from invoke.parser import Parser

import tasks
from pipeline.core.settings import ROOT, Settings

WORKFLOWS = sorted((ROOT / "deploy/github").iterdir())


def scripts(workflow: Path) -> list[str]:
    jobs: dict[str, Any] = yaml.safe_load(workflow.read_text())["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_calls_tasks_that_exist_in_shell_that_is_right(workflow: Path) -> None:
    parser = Parser(contexts=Collection.from_module(tasks).to_contexts())
    calls = [
        call for script in scripts(workflow) for call in re.findall(r"\./inv ([^|)\n]+)", script)
    ]
    assert calls
    for call in calls:
        parser.parse_argv(shlex.split(call))
    for script in scripts(workflow):
        # An expression in a script is replaced before the shell reads it: text of others would run.
        assert "${{" not in script
        argv = [str(Path(sys.executable).with_name("shellcheck")), "--shell=bash", "-"]
        checked = subprocess.run(argv, input=script, text=True, capture_output=True, check=False)
        assert checked.returncode == 0, checked.stdout
    for name in re.findall("INVOKE_ADVISORIES_BLOCK: (.+)", workflow.read_text()):
        assert Settings(advisories={"block": name})


def test_only_the_job_that_publishes_may_sign_and_every_job_says_what_it_may() -> None:
    publish = yaml.safe_load((ROOT / "deploy/github/publish.yaml").read_text())
    assert publish["permissions"] == {}
    signing = {name for name, job in publish["jobs"].items() if "id-token" in job["permissions"]}
    assert signing == {"publish"}
