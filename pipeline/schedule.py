"""When nights run: an entry in the user's crontab, or a systemd timer where there is one."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shlex
import shutil
from collections.abc import Mapping
from datetime import time
from pathlib import Path

from pipeline import process
from pipeline.ca import VARIABLES
from pipeline.errors import ScheduleFailed, SettingRefused
from pipeline.report import ok, say, warn
from pipeline.settings import ROOT, Settings

DELAY_SECONDS = 3600
"""Each night begins at a random moment in this time: not everybody asks the registries in the same second."""

KEPT = (
    "CONTAINER", "DOCKER_", "GIT_SSL_", "INVOKE_", "NO_PROXY", "NPM_CONFIG_", "PIP_INDEX_URL", "UV_", "XDG_",
    "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", *VARIABLES,
)  # fmt: skip
"""How the names of the variables begin that a night needs as much as we do: cron and systemd hand on none of them."""

SECRET = re.compile("TOKEN|KEY|SECRET|PASS|AUTH|WEBHOOK", re.IGNORECASE)


def environment(environ: Mapping[str, str] = os.environ) -> tuple[dict[str, str], list[str]]:
    """Return what of ``environ`` goes with the entry, and the names of what might be secret, which does not."""
    chosen = {name: environ[name] for name in sorted(environ) if name.startswith(KEPT)}
    secret = [name for name, value in chosen.items() if SECRET.search(name) or re.search(r"://[^/]*@", value)]
    kept = {name: value for name, value in chosen.items() if name not in secret and "\n" not in value}
    return {"PATH": environ.get("PATH", os.defpath), **kept}, secret


def argv(root: Path, environ: Mapping[str, str], *, delay: bool) -> list[str]:
    """Return the command of a night: absolute, with its environment in front."""
    told = [f"{name}={value}" for name, value in environ.items()]
    return ["/usr/bin/env", *told, str(root / "inv"), "nightly", "--log", *(["--delay", str(DELAY_SECONDS)] * delay)]


def crontab_line(root: Path, environ: Mapping[str, str]) -> str:
    r"""Return it for a crontab, where a ``%`` would end the command unless it is ``\%``."""
    return shlex.join(argv(root, environ, delay=True)).replace("%", r"\%")


def units(root: Path, environ: Mapping[str, str], at: time) -> dict[str, str]:
    """Return the service and the timer, by file name; systemd itself spreads the starts."""
    command = " ".join(f'"{word}"'.replace("%", "%%").replace("$", "$$") for word in argv(root, environ, delay=False))
    name = _name(root)
    return {
        f"{name}.service": f"[Unit]\nDescription=A night of {root}\n\n[Service]\nType=oneshot\nExecStart={command}\n",
        f"{name}.timer": f"[Unit]\nDescription=Nights of {root}\n\n[Timer]\nOnCalendar=*-*-* {at:%H:%M}:00\n"
        f"RandomizedDelaySec={DELAY_SECONDS}\nPersistent=true\n\n[Install]\nWantedBy=timers.target\n",
    }


def schedule(
    settings: Settings, *, at: str = "", remove: bool = False, show: bool = False, systemd: bool = False,
    dry_run: bool = False, root: Path = ROOT,
) -> None:  # fmt: skip
    """Install, ``show`` or ``remove`` the entry that runs ``nightly`` each night.

    Installing it twice leaves one. It takes along what of this environment a night needs, and never a secret.
    Raises ScheduleFailed, SettingRefused.
    """
    del settings  # read when a night begins, not now
    moment = _moment(at)
    environ, secret = environment()
    if secret and not (remove or show):
        warn(
            f"{', '.join(secret)} may hold a secret and is left out: set it where the night finds it (docs/nightly.md)"
        )
    if systemd:
        _systemd(units(root, environ, moment), remove=remove, show=show, dry_run=dry_run)
    else:
        _cron(root, crontab_line(root, environ), moment, remove=remove, show=show, dry_run=dry_run)


def _cron(root: Path, line: str, at: time, *, remove: bool, show: bool, dry_run: bool) -> None:
    from crontab import CronTab

    if not shutil.which("crontab"):
        raise ScheduleFailed("there is no crontab on PATH", "Install cron, or use --systemd.")
    try:
        table = CronTab(user=True)
        mine = list(table.find_comment(_name(root)))
        if show:
            say("\n".join(map(str, mine)) or f"no entry runs nights of {root}")
            return
        for entry in mine:
            table.remove(entry)
        if not remove:
            entry = table.new(command=line, comment=_name(root))
            entry.setall(f"{at.minute} {at.hour} * * *")
            say(str(entry))
        if not dry_run:
            table.write()
            ok(f"crontab: {'removed' if remove else 'nights begin within an hour after ' + f'{at:%H:%M}'}")
    except OSError as error:
        raise ScheduleFailed("the crontab cannot be read or written", "May this user have one?", str(error)) from error


def _systemd(files: dict[str, str], *, remove: bool, show: bool, dry_run: bool) -> None:
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "systemd" / "user"
    timer = next(name for name in files if name.endswith(".timer"))
    if show:
        say(_systemctl("list-timers", timer) if (folder / timer).exists() else f"there is no {folder / timer}")
        return
    if dry_run:
        say("\n".join(f"{folder / name}:\n{text}" for name, text in files.items()))
        return
    if remove:
        _systemctl("disable", "--now", timer)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        if remove:
            (folder / name).unlink(missing_ok=True)
        else:
            draft = folder / f".{name}.part"
            draft.write_text(text)
            draft.replace(folder / name)
    _systemctl("daemon-reload")
    if not remove:
        _systemctl("enable", "--now", timer)
        say("systemd: nights of a user who is not logged in need `loginctl enable-linger` once")
    ok(f"systemd: {timer} is {'removed' if remove else 'on'}")


def _systemctl(*words: str) -> str:
    done = process.run(["systemctl", "--user", *words], timeout=60)
    if not done.ok:
        raise ScheduleFailed(
            f"systemctl --user {words[0]} ended with {done.code}", "Use cron: without --systemd.", done.said
        )
    return done.stdout.strip()


def _moment(at: str) -> time:
    if not at:
        return time(random.randrange(1, 5), random.randrange(60))  # noqa: S311 -- see DELAY_SECONDS
    try:
        return time.fromisoformat(at)
    except ValueError as error:
        raise SettingRefused(f"--at {at} is no time of day", "Write it as HH:MM.") from error


def _name(root: Path) -> str:
    return f"opencode-server-nightly-{hashlib.sha256(str(root).encode()).hexdigest()[:6]}"
