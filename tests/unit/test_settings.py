"""The settings: invoke.yaml, what overrides it, and what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from invoke.config import Config

from pipeline.core import settings
from pipeline.core.errors import SettingRefused
from pipeline.core.settings import ROOT, Settings, load

SHOW = """
from invoke import task
@task
def show(c):
    from pipeline.core import settings
    print(settings.load(c.config).model_dump_json())
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "invoke.yaml", tmp_path)
    (tmp_path / "tasks.py").write_text(SHOW)
    return tmp_path


def invoke(project: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "invoke", *options, "show"],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_invoke_yaml_is_every_setting_with_its_default_and_a_comment() -> None:
    config = Config(project_location=ROOT, lazy=True)
    config.load_project()
    written = {
        name: value for name, value in config.items() if name not in settings.INVOKE_SECTIONS
    }
    assert written == json.loads(Settings().model_dump_json())
    lines = (ROOT / "invoke.yaml").read_text().splitlines()
    bare = [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if re.match(r" *\w+: *\S", line) and not before.strip().startswith("#")
    ]
    assert bare == []


def test_the_environment_and_a_file_of_ones_own_override_a_line(project: Path) -> None:
    (project / "mine.yaml").write_text(
        "base:\n  mirrors: [registry.example.com/library/node]\nimage: mine\n"
    )
    done = invoke(
        project,
        "-f",
        "mine.yaml",
        INVOKE_ENGINE="docker",
        INVOKE_SMOKE_READY_SECONDS="120",
        INVOKE_OPENAGENTS_REF="main",
        INVOKE_RUN_ECHO="1",
    )
    got = json.loads(done.stdout)
    assert (got["engine"], got["smoke"]["ready_seconds"], got["openagents"]["ref"]) == (
        "docker",
        120,
        "main",
    )
    assert got["image"] == "mine"
    assert got["base"] == {
        "mirrors": ["registry.example.com/library/node"],
        "make": "auto",
        "debian_mirror": "",
    }


def test_what_is_refused_is_named_and_leaves_with_10(project: Path) -> None:
    done = invoke(project, INVOKE_SMOKE_PORT="70000")
    assert (done.returncode, done.stdout) == (10, "")
    assert done.stderr.startswith("SettingRefused: INVOKE_SMOKE_PORT: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("INVOKE_SMOKE_READY_SECONDS", "soon"),
        ("INVOKE_SMOKE_PORT", "1.5"),
        ("INVOKE_BASE_MIRRORS", "a"),
    ],
)
def test_what_invoke_itself_would_meet_with_a_traceback_is_refused_too(
    name: str, value: str
) -> None:
    argv = [sys.executable, "-m", "invoke", "--search-root", str(ROOT), "build", "--dry-run"]
    done = subprocess.run(
        argv, env={**os.environ, name: value}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (10, "")
    assert done.stderr.startswith(f"SettingRefused: {name}")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"engin": "podman"}, "engin: "),
        ({"smoke": {"redy_seconds": 3}}, "smoke.redy_seconds: "),
        ({"engine": "lxc"}, "engine: "),
        ({"image": "Not An Image"}, "image: "),
        ({"image": "a:b"}, "image: "),
        ({"network": {"attempts": 0}}, "network.attempts: "),
        ({"smoke": {"ready_seconds": 0}}, "smoke.ready_seconds: "),
        ({"smoke": None}, "smoke: "),
        ({"base": {"mirrors": "one"}}, "base.mirrors: "),
    ],
)
def test_an_unknown_key_or_an_impossible_value_is_refused_by_name(
    config: dict[str, object], named: str
) -> None:
    with pytest.raises(SettingRefused) as caught:
        load(config, {})
    assert caught.value.what.startswith(named)


def test_every_fault_is_named_at_once_and_settings_do_not_change() -> None:
    with pytest.raises(SettingRefused, match=r"engine: .*; smoke\.port: "):
        load({"engine": 3, "smoke": {"port": -1}, "run": {"echo": True}}, {})
    loaded = load({"run": {"echo": True}, "tasks": {}}, {})
    with pytest.raises(ValueError, match="frozen"):
        loaded.engine = "docker"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("INVOKE_ENGINE", True),
        ("INVOKE_BASE_DEBIAN_MIRROR", True),
        ("INVOKE_RUN_ECHO", True),
        ("INVOKE_DEBUG", True),
        ("INVOKE_RUNTIME_CONFIG", True),
        ("OTHER", True),
        ("INVOKE_ENGIN", False),
        ("INVOKE_SMOKE", False),
        ("INVOKE_READY_SECONDS", False),
    ],
)
def test_a_misspelt_variable_is_refused(name: str, *, known: bool) -> None:
    if known:
        load({}, {name: "docker"})
    else:
        with pytest.raises(SettingRefused, match=f"{name}: "):
            load({}, {name: "1"})
