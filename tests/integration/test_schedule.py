"""The crontab by the real crontab, and a real cron daemon that starts a night, in a mount namespace of their own."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import schedule
from pipeline.errors import ScheduleFailed, SettingRefused
from pipeline.settings import ROOT, Settings

pytestmark = pytest.mark.server

ALONE = (
    "mount -t tmpfs tmpfs /var/spool/cron/crontabs && chmod 1730 /var/spool/cron/crontabs && chgrp crontab "
    "/var/spool/cron/crontabs && mount -t tmpfs tmpfs /etc/cron.d && touch {0}/empty {0}/pid "
    "&& mount --bind {0}/empty /etc/crontab && {{ [ -e /run/crond.pid ] || : > /run/crond.pid; }} "
    "&& mount --bind {0}/pid /run/crond.pid && "
)
"""What hides this machine's tables, and its daemon's lock, from the cron that is started in a mount namespace."""


def alone(tmp_path: Path, script: str, **env: str) -> subprocess.CompletedProcess[str]:
    argv = ["unshare", "--mount", "sh", "-c", ALONE.format(shlex.quote(str(tmp_path))) + script]
    return subprocess.run(argv, env={**os.environ, **env}, capture_output=True, text=True, timeout=120, check=False)


def python(code: str) -> str:
    start = "from pipeline.schedule import schedule; from pipeline.settings import Settings; from pathlib import Path; "
    return f"cd {ROOT} && {shlex.join([sys.executable, '-c', start + code])}"


def test_the_entry_is_installed_once_shown_and_removed_and_others_stay(tmp_path: Path) -> None:
    root = f"Path({str(tmp_path / 'check out')!r})"
    steps = [
        "echo '5 4 * * * echo 100\\% mine # keep' | crontab -",
        python(f"schedule(Settings(), at='03:17', dry_run=True, root={root})"), "crontab -l", "echo ====",
        python(f"[schedule(Settings(), at=at, root={root}) for at in ('03:17', '04:18')]"), "crontab -l", "echo ====",
        python(f"schedule(Settings(), show=True, root={root})"), "echo ====",
        python(f"schedule(Settings(), remove=True, root={root})"), "crontab -l",
    ]  # fmt: skip
    env = {"INVOKE_ENGINE": "docker", "UV_INDEX_TOKEN": "x" * 9, "HTTPS_PROXY": "http://me:hidden@proxy:1"}
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
    assert "HTTPS_PROXY, UV_INDEX_TOKEN may hold a secret and is left out" in installed
    assert shown.strip() == entries[0]
    assert removed.splitlines()[-1] == mine
    assert "inv" not in removed


def small_checkout(tmp_path: Path) -> Path:
    """Return a checkout whose ./inv has no .venv, and whose night is over where it looks for an engine."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "pipeline", root / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tasks.py", "releases.py", "stacks.py", "invoke.yaml"):
        shutil.copy(ROOT / name, root / name)
    (root / "inv").write_text(f'#!/bin/sh\nexec {sys.executable} -P -m invoke --search-root {root} "$@"\n')
    (root / "inv").chmod(0o755)
    return root


def test_a_real_cron_starts_a_real_night(tmp_path: Path) -> None:
    """At 03:17 by cron's own clock, which begins at seven seconds to."""
    root = small_checkout(tmp_path)
    install = f"schedule(Settings(), at='03:17', root=Path({str(root)!r}))"
    at_once = f"import pipeline.schedule as s; s.DELAY_SECONDS = 0; {install}"
    history = root / "build/history.jsonl"
    watch = (
        "faketime -f '@2027-01-15 03:16:53' cron -f >/dev/null 2>&1 & n=0; "
        f"until [ -s {history} ] || [ $n = 600 ]; do n=$((n + 1)); sleep 0.1; done; kill $(cat {tmp_path}/pid)"
    )
    env = {"INVOKE_ENGINE": "docker", "DOCKER_HOST": f"unix://{tmp_path}/none"}
    done = alone(tmp_path, f"{python(at_once)} && {{ {watch}; }}", **env)
    assert done.returncode == 0, done.stderr
    record = (root / "build/history.jsonl").read_text()
    assert '"outcome": "failed", "where": "engine"' in record
    deadline = time.monotonic() + 20
    while (
        not (logs := [path.read_text() for path in (root / "build/nights").glob("*.log")])
        or "NightFailed" not in logs[0]
    ):
        assert time.monotonic() < deadline
    assert "NightFailed: engine: " in logs[0]


def test_the_units_are_what_systemd_takes(tmp_path: Path) -> None:
    root = tmp_path / "check out 100%"
    root.mkdir()
    (root / "inv").write_text("#!/bin/sh\n")
    (root / "inv").chmod(0o755)
    made = schedule.units(root, {"PATH": "/bin", "A": "$HOME"}, schedule._moment("03:17"))
    for name, text in made.items():
        (tmp_path / name).write_text(text)
    service, timer = sorted(made)
    assert 'ExecStart="/usr/bin/env" "PATH=/bin" "A=$$HOME"' in made[service]
    assert f'"{tmp_path}/check out 100%%/inv" "nightly" "--log"\n' in made[service]
    assert "OnCalendar=*-*-* 03:17:00\nRandomizedDelaySec=3600\n" in made[timer]
    verify = shutil.which("systemd-analyze")
    assert verify, "no systemd-analyze; inv setup --tests installs it"
    done = subprocess.run(
        [verify, "verify", *(str(tmp_path / name) for name in made)], capture_output=True, text=True, check=False
    )
    assert [line for line in done.stderr.splitlines() if str(tmp_path) in line] == []
    assert done.returncode == 0, done.stderr


MANAGER = """
set -eu
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system /run/user/0
chmod 700 /run/user/0
boot() {{
    {systemd} --user --unit=default.target </dev/null >>{home}/log 2>&1 &
    pid=$!
    patiently is_up
}}
is_up() {{ systemctl --user is-system-running 2>/dev/null | grep -qE 'running|degraded'; }}
patiently() {{ n=0; until "$@"; do n=$((n + 1)); [ $n -lt 200 ]; sleep 0.1; done; }}
off() {{ kill $pid; wait $pid || true; }}
"""
"""A user's systemd in namespaces of its own: it wants to see that the machine was booted by one, and a /run."""


@contextlib.contextmanager
def cgroup() -> Iterator[list[Path]]:
    """Make a control group for a systemd to divide, in each hierarchy in which it does; yield its directories."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    places = [Path(mount[1]) for mount in mounts if mount[2] == "cgroup2" or "name=systemd" in mount[3]]
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    ours = {("systemd" if name else "unified"): path for _, name, path in lines if name in {"", "name=systemd"}}
    made = [place / ours["systemd" if place.name == "systemd" else "unified"].strip("/") / f"oc-test{os.getpid()}"
            for place in places]  # fmt: skip
    for each in made:
        each.mkdir()
    try:
        yield made
    finally:
        for each in made:
            for below in sorted((path.parent for path in each.rglob("cgroup.procs")), key=str, reverse=True):
                below.rmdir()


def test_a_real_systemd_makes_up_for_a_night_on_which_the_machine_was_off(tmp_path: Path) -> None:
    root, home = small_checkout(tmp_path), tmp_path / "home"
    home.mkdir()
    name = schedule._name(root)
    ours = f"schedule(Settings(), systemd=True, root=Path({str(root)!r})"
    at_once = f"import pipeline.schedule as s; s.DELAY_SECONDS = 0; {ours}"
    history, stamp = root / "build/history.jsonl", home / f".local/share/systemd/timers/stamp-{name}.timer"
    systemd = shutil.which("systemd", path="/usr/lib/systemd:/lib/systemd")
    assert systemd, "no systemd; inv setup --tests installs it"
    with cgroup() as groups:
        steps = [
            *(f"echo $$ > {group}/cgroup.procs" for group in groups),
            MANAGER.format(systemd=systemd, home=home), "boot",
            python(f"{at_once}, at='03:17')"), "echo ====", python(f"{at_once}, show=True)"), "echo ====", "off",
            f"[ ! -e {history} ]", f"touch --date='3 days ago' {stamp}",
            "boot", f"patiently test -s {history}", python(f"{at_once}, remove=True)"),
            "systemctl --user list-timers --all --no-legend", f"ls {home}/.config/systemd/user", "off",
        ]  # fmt: skip
        env = {**os.environ, "HOME": str(home), "XDG_RUNTIME_DIR": "/run/user/0", "INVOKE_ENGINE": "docker",
               "DOCKER_HOST": f"unix://{tmp_path}/none"}  # fmt: skip
        for variable in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "DBUS_SESSION_BUS_ADDRESS"):
            env.pop(variable, None)
        spaces = ["--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        argv = ["unshare", *spaces, "sh", "-c", "\n".join(steps)]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr + (home / "log").read_text()
    installed, shown, removed = done.stdout.split("====\n")
    assert f"{name}.timer is on" in installed
    assert "03:17:00" in shown
    assert f"{name}.service" in shown
    assert '"outcome": "failed", "where": "engine"' in history.read_text()
    assert name not in removed.replace(f"{name}.timer is removed", "")


def test_what_cannot_be_scheduled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SettingRefused, match="25:00 is no time of day"):
        schedule.schedule(Settings(), at="25:00")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ScheduleFailed, match="no crontab"):
        schedule.schedule(Settings(), show=True)


def test_systemd_is_told_by_its_own_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Here the command is a script that writes down what it is told: no systemd runs in a container."""
    (tmp_path / "systemctl").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n')
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "config/systemd/user"
    schedule.schedule(Settings(), systemd=True, dry_run=True)
    assert not folder.exists()
    schedule.schedule(Settings(), systemd=True)
    timer, service = sorted(path.name for path in folder.iterdir())[::-1]
    assert (service.endswith(".service"), timer.endswith(".timer")) == (True, True)
    schedule.schedule(Settings(), systemd=True, show=True)
    schedule.schedule(Settings(), systemd=True, remove=True)
    assert list(folder.iterdir()) == []
    words = [line.replace(timer, "TIMER") for line in (tmp_path / "told").read_text().splitlines()]
    assert words == [
        "--user daemon-reload", "--user enable --now TIMER", "--user list-timers TIMER",
        "--user disable --now TIMER", "--user daemon-reload",
    ]  # fmt: skip
    (tmp_path / "systemctl").write_text("#!/bin/sh\necho no bus >&2; exit 1\n")
    with pytest.raises(ScheduleFailed, match="systemctl --user"):
        schedule.schedule(Settings(), systemd=True)
