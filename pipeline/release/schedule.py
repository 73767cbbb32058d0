"""The entry in the user's crontab that runs ``nightly`` every night.

The entry names a script, build/nightly.sh, that sets the environment: cron passes on none of it,
ends a command at an unescaped % and refuses one of more than 998 characters (crontab(5)).
"""

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

from pipeline.core.console import log, ok, warn
from pipeline.core.errors import ScheduleFailed, SettingRefused
from pipeline.core.settings import ROOT
from pipeline.inputs.ca import VARIABLES

DELAY_SECONDS = 3600
"""A night starts at a random moment within this time, which spreads the load on registries."""

PASSED_ON = re.compile(
    rf"PATH|LANG|LC_\w+|TMPDIR|SSL_CERT_DIR|{'|'.join(VARIABLES)}|(ALL|HTTPS?|NO)_PROXY"
    r"|DD_(API_KEY|SITE|URL)|GIT_(ASKPASS|CONFIG|PROXY|SSH|SSL)\w*|XDG_(CACHE|CONFIG|DATA)_\w+"
    r"|(BUILDAH|BUILDKIT|BUILDX|CONTAINERS?|DOCKER|INVOKE|NPM_CONFIG|PIP|REGISTRY|UV)_\w+",
    re.IGNORECASE,
)
"""The variables that a night needs. Proxies and npm's are also spelled in lower case."""

SESSION = re.compile(r"(DBUS|XDG)_\w+|SSH_A\w+")
"""Variables that name something which ends when the user logs out."""


def schedule(
    *,
    at: str = "",
    remove: bool = False,
    show: bool = False,
    dry_run: bool = False,
    root: Path = ROOT,
) -> None:
    """Install, ``show`` or ``remove`` the entry for the checkout ``root``.

    ``at`` is HH:MM; the default is a random minute between 01:00 and 04:59. Installing replaces an
    earlier entry and leaves those of others alone. Raises ScheduleFailed, SettingRefused.
    """
    start = _time(at)
    if not shutil.which("crontab"):
        what = "crontab is not on PATH"
        raise ScheduleFailed(what, "Install cron, or use deploy/systemd (docs/nightly.md).")
    from crontab import CronTab

    digest = hashlib.sha256(str(root).encode()).hexdigest()
    name = f"opencode-server-nightly-{digest[:6]}"
    file = root / "build/nightly.sh"
    try:
        table = CronTab(user=True)
        entries = list(table.find_comment(name))
        if show:
            log("\n".join(map(str, entries)) or f"no crontab entry runs nightly in {root}")
            return
        table.remove_all(comment=name)
        if not remove:
            text = script(root)
            # python-crontab escapes %.
            entry = table.new(shlex.join(["/bin/sh", str(file)]), comment=name)
            entry.setall(start)
            log(str(entry))
            if not dry_run:
                _write(file, text)
        if not dry_run:
            table.write()
            if remove:
                file.unlink(missing_ok=True)
            ok("crontab: entry removed" if remove else f"crontab: nightly runs after {start:%H:%M}")
    except OSError as error:
        raise ScheduleFailed(
            f"the crontab or {file} cannot be written",
            "Check that this user may have a crontab: crontab -l",
            str(error),
        ) from error


def script(root: Path, environ: Mapping[str, str] = os.environ) -> str:
    """Return the script that the entry runs; print which variables it sets and which it does not.

    Raises SettingRefused for a path or a value with a line break.
    """
    names = [name for name in environ if PASSED_ON.fullmatch(name)]
    passed_on = {name: environ[name] for name in sorted(names)}
    for name, value in {"the path of the checkout": str(root), **passed_on}.items():
        if re.search(r"[\r\n]", value):
            raise SettingRefused(f"{name} contains a line break", "Correct it, or unset it.")
    log(f"schedule: build/nightly.sh (mode 0600) sets {', '.join(passed_on)}")
    others = environ.keys() - passed_on
    session = [name for name in sorted(others) if SESSION.fullmatch(name)]
    if session:
        warn(f"left out, since they end with your login session: {', '.join(session)}")
    log(f"schedule: not passed on: {', '.join(sorted(others - {*session}))}")
    for name, value in passed_on.items():
        if "/run/user/" in value:
            warn(f"{name} is in /run/user: keep that after log-out: loginctl enable-linger")
    lines = [f"export {name}={shlex.quote(value)}" for name, value in passed_on.items()]
    night = f"exec {shlex.quote(str(root / 'inv'))} nightly --log --delay {DELAY_SECONDS}"
    return "\n".join(["# Written by inv schedule.", *lines, night, ""])


def _write(file: Path, text: str) -> None:
    """Write a file that only its owner can read, since it may hold credentials."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".part")
    draft.unlink(missing_ok=True)
    draft.touch(0o600)
    draft.write_text(text)
    draft.replace(file)


def _time(at: str) -> time:
    if not at:
        return time(random.randrange(1, 5), random.randrange(60))  # noqa: S311 -- no secret
    try:
        return time.fromisoformat(at)
    except ValueError as error:
        raise SettingRefused(f"--at {at} is not a time of day", "Use HH:MM.") from error
