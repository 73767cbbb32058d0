"""The crontab by the real crontab, and a real cron daemon that starts a night, in a mount namespace
of their own.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.core.errors import ScheduleFailed, SettingRefused
from pipeline.core.settings import ROOT
from pipeline.release import schedule

pytestmark = pytest.mark.server

ALONE = (
    "mount -t tmpfs tmpfs /var/spool/cron/crontabs && chmod 1730 /var/spool/cron/crontabs && chgrp crontab "
    "/var/spool/cron/crontabs && mount -t tmpfs tmpfs /etc/cron.d && touch {0}/empty {0}/pid "
    "&& mount --bind {0}/empty /etc/crontab && {{ [ -e /run/crond.pid ] || : > /run/crond.pid; }} "
    "&& mount --bind {0}/pid /run/crond.pid && "
)
"""What hides this machine's tables, and its daemon's lock, from the cron that is started in a mount
namespace.
"""


def alone(tmp_path: Path, script: str, **env: str) -> subprocess.CompletedProcess[str]:
    argv = ["unshare", "--mount", "sh", "-c", ALONE.format(shlex.quote(str(tmp_path))) + script]
    return subprocess.run(
        argv, env={**os.environ, **env}, capture_output=True, text=True, timeout=120, check=False
    )


def python(code: str) -> str:
    start = "from pathlib import Path; from pipeline.release.schedule import schedule; "
    return f"cd {ROOT} && {shlex.join([sys.executable, '-c', start + code])}"


def test_the_entry_is_installed_once_shown_and_removed_and_others_stay(tmp_path: Path) -> None:
    root = f"Path({str(tmp_path / 'check out')!r})"
    steps = [
        "echo '5 4 * * * echo 100\\% mine # keep' | crontab -",
        python(f"schedule(at='03:17', dry_run=True, root={root})"),
        "crontab -l",
        "echo ====",
        python(f"[schedule(at=at, root={root}) for at in ('03:17', '04:18')]"),
        "crontab -l",
        "echo ====",
        python(f"schedule(show=True, root={root})"),
        "echo ====",
        python(f"schedule(remove=True, root={root})"),
        "crontab -l",
    ]
    env = {"INVOKE_ENGINE": "docker"}
    done = alone(tmp_path, " && ".join(steps), **env)
    assert done.returncode == 0, done.stderr
    dry, installed, shown, removed = done.stdout.split("====\n")
    mine = "5 4 * * * echo 100\\% mine # keep"
    assert dry.splitlines()[-1] == mine, "a dry run writes nothing"
    table = installed[installed.index(mine) :]
    entries = [line for line in table.splitlines() if "nightly.sh" in line]
    assert len(entries) == 1
    script = f"'{tmp_path}/check out/build/nightly.sh'"
    assert entries[0].startswith(f"18 4 * * * /bin/sh {script} # opencode-server-nightly-")
    assert shown.strip() == entries[0]
    assert removed.splitlines()[-1] == mine
    assert "nightly.sh" not in removed
    assert list((tmp_path / "check out/build").iterdir()) == []


def test_the_script_sets_what_a_night_needs_and_the_rest_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    passed_on = {
        "https_proxy": "http://me:it's@proxy:1",
        "no_proxy": "git.intern",
        "npm_config_registry": "https://npm.intern/100%",
        "UV_INDEX_TOKEN": "s3cret",
        "GIT_SSH_COMMAND": "ssh -i key",
        "DOCKER_HOST": "unix:///run/user/1000/docker.sock",
    }
    dropped = {"XDG_RUNTIME_DIR": "/run/user/1000", "SSH_AUTH_SOCK": "/tmp/a", "GIT_DIR": "/g"}
    (tmp_path / "inv").write_text("#!/bin/sh\nexec env\n")
    (tmp_path / "inv").chmod(0o755)
    schedule._write(
        file := tmp_path / "build/nightly.sh", schedule.script(tmp_path, {**passed_on, **dropped})
    )
    assert file.stat().st_mode & 0o777 == 0o600
    env = subprocess.run(["/bin/sh", file], env={}, capture_output=True, text=True, check=True)
    assert {*passed_on.items()} <= {tuple(line.split("=", 1)) for line in env.stdout.splitlines()}
    assert not [name for name in dropped if name in env.stdout]
    out = capsys.readouterr().out
    assert "left out, since they end with your login session: SSH_AUTH_SOCK, XDG_RUNTIME_DIR" in out
    assert "not passed on: GIT_DIR" in out
    assert "!!    DOCKER_HOST is in /run/user" in out
    assert "s3cret" not in out
    assert "it's" not in out
    for root, environ in ((tmp_path / "a\n* * * * * id", {}), (tmp_path, {"PIP_CERT": "a\r\nb"})):
        with pytest.raises(SettingRefused, match="contains a line break"):
            schedule.script(root, environ)


def small_checkout(tmp_path: Path) -> Path:
    """Return a checkout whose ./inv has no .venv, and whose night is over where it looks for an
    engine.
    """
    root = tmp_path / "check out 100% é"
    shutil.copytree(
        ROOT / "pipeline", root / "pipeline", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("tasks.py", "releases.py", "stacks.py", "invoke.yaml"):
        shutil.copy(ROOT / name, root / name)
    (root / "inv").write_text(
        f"#!/bin/sh\nexec {sys.executable} -P -m invoke --search-root '{root}' \"$@\"\n"
    )
    (root / "inv").chmod(0o755)
    return root


def test_a_real_cron_starts_a_real_night(tmp_path: Path) -> None:
    """At 03:17 by cron's own clock, which begins at seven seconds to.

    The path has what cron and shells treat specially, and the environment is too long for an entry.
    """
    root = small_checkout(tmp_path)
    install = f"schedule(at='03:17', root=Path({str(root)!r}))"
    at_once = f"import pipeline.release.schedule as s; s.DELAY_SECONDS = 0; {install}"
    history = root / "build/history.jsonl"
    watch = (
        "faketime -f '@2027-01-15 03:16:53' cron -f >/dev/null 2>&1 & n=0; "
        f"until [ -s '{history}' ] || [ $n = 600 ]; do n=$((n + 1)); sleep 0.1; done; kill $(cat {tmp_path}/pid)"
    )
    env = {
        "INVOKE_ENGINE": "docker",
        "DOCKER_HOST": f"unix://{tmp_path}/none",
        "PATH": f"{os.environ['PATH']}:/{'long/' * 300}",
    }
    done = alone(tmp_path, f"{python(at_once)} && {{ {watch}; }}", **env)
    assert done.returncode == 0, done.stderr
    record = json.loads((root / "build/history.jsonl").read_text())
    assert (record["outcome"], record["where"]) == ("failed", "start")
    deadline = time.monotonic() + 20
    while (
        not (logs := [path.read_text() for path in (root / "build/nights").glob("*.log")])
        or "NightFailed" not in logs[0]
    ):
        assert time.monotonic() < deadline
    assert "NightFailed: start: " in logs[0]


def test_systemd_accepts_the_sample_units(tmp_path: Path) -> None:
    """As docs/nightly.md says: copied, with the path of the checkout set."""
    inv = tmp_path / "checkout/inv"
    inv.parent.mkdir()
    inv.write_text("#!/bin/sh\n")
    inv.chmod(0o755)
    units = sorted((ROOT / "deploy/systemd").iterdir())
    assert [unit.suffix for unit in units] == [".service", ".timer"]
    for unit in units:
        text = unit.read_text()
        (tmp_path / unit.name).write_text(text.replace("%h/opencode-server/inv", str(inv)))
    assert str(inv) in (tmp_path / units[0].name).read_text()
    verify = shutil.which("systemd-analyze")
    assert verify, "no systemd-analyze; inv setup --tests installs it"
    argv = [verify, "verify", *(str(tmp_path / unit.name) for unit in units)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if str(tmp_path) in line] == []
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_scheduled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SettingRefused, match="--at 25:00 is not a time of day"):
        schedule.schedule(at="25:00")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ScheduleFailed, match="crontab is not on PATH"):
        schedule.schedule(show=True)
