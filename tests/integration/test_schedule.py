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
    env = {
        "INVOKE_ENGINE": "docker",
        "UV_INDEX_TOKEN": "x" * 9,
        "HTTPS_PROXY": "http://me:hidden@proxy:1",
    }
    done = alone(tmp_path, " && ".join(steps), **env)
    assert done.returncode == 0, done.stderr
    dry, installed, shown, removed = done.stdout.split("====\n")
    mine = "5 4 * * * echo 100\\% mine # keep"
    assert dry.splitlines()[-1] == mine, "a dry run writes nothing"
    table = installed[installed.index(mine) :]
    entries = [line for line in table.splitlines() if "inv" in line]
    assert len(entries) == 1
    assert entries[0].startswith("18 4 * * * /usr/bin/env PATH=")
    assert f"'{tmp_path}/check out/inv' nightly --log --delay 3600" in entries[0]
    assert "INVOKE_ENGINE=docker" in entries[0]
    assert "hidden" not in done.stdout
    assert "x" * 9 not in done.stdout
    for name in ("HTTPS_PROXY", "UV_INDEX_TOKEN"):
        assert f"!!    {name} may hold a secret and is left out" in installed
    assert shown.strip() == entries[0]
    assert removed.splitlines()[-1] == mine
    assert "inv" not in removed


def small_checkout(tmp_path: Path) -> Path:
    """Return a checkout whose ./inv has no .venv, and whose night is over where it looks for an
    engine.
    """
    root = tmp_path / "checkout"
    shutil.copytree(
        ROOT / "pipeline", root / "pipeline", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("tasks.py", "releases.py", "stacks.py", "invoke.yaml"):
        shutil.copy(ROOT / name, root / name)
    (root / "inv").write_text(
        f'#!/bin/sh\nexec {sys.executable} -P -m invoke --search-root {root} "$@"\n'
    )
    (root / "inv").chmod(0o755)
    return root


def test_a_real_cron_starts_a_real_night(tmp_path: Path) -> None:
    """At 03:17 by cron's own clock, which begins at seven seconds to."""
    root = small_checkout(tmp_path)
    install = f"schedule(at='03:17', root=Path({str(root)!r}))"
    at_once = f"import pipeline.release.schedule as s; s.DELAY_SECONDS = 0; {install}"
    history = root / "build/history.jsonl"
    watch = (
        "faketime -f '@2027-01-15 03:16:53' cron -f >/dev/null 2>&1 & n=0; "
        f"until [ -s {history} ] || [ $n = 600 ]; do n=$((n + 1)); sleep 0.1; done; kill $(cat {tmp_path}/pid)"
    )
    env = {"INVOKE_ENGINE": "docker", "DOCKER_HOST": f"unix://{tmp_path}/none"}
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
