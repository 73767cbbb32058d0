"""The image as a container that makes backups: its schedule starts a real backup, and SIGTERM ends
it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backups import ENCRYPTION, SECRETS, World, world
from tests.conftest import Built
from tests.servers import until

pytestmark = [pytest.mark.engine, pytest.mark.server]
NAME = "opencode-server-test-backup"


@contextlib.contextmanager
def role(built: Built, here: World, work: Path) -> Iterator[None]:
    """Run the role on the host's network, so that it finds the servers on loopback."""
    env = {
        **here.environ,
        "BACKUP_SCHEDULE": "* * * * *",
        "BACKUP_PASSWORD": ENCRYPTION,
        "BACKUP_WORK_DIR": str(work),
    }
    words = ["run", "--detach", "--name", NAME, "--network", "host", *built.engine.limits]
    words += [
        "--volume",
        f"{here.auth.parent}:/root/.local/share/opencode",
        "--entrypoint",
        "/app/scripts/backup",
        "--read-only",
        "--tmpfs",
        "/tmp",
        "--tmpfs",
        "/var/tmp",
        "--cap-drop",
        "all",
    ]
    words += [word for name in env for word in ("--env", name)]
    argv = built.engine.argv(*words, built.reference, "schedule")
    done = built.engine.ask(argv, env={**os.environ, **env})
    try:
        assert done.ok, done.output
        yield
    finally:
        built.engine.ask(built.engine.remove_container(NAME))


@pytest.mark.parametrize(
    "built", ["podman"], indirect=True
)  # the schedule's minutes are long, and no engine changes them
@pytest.mark.usefixtures("unmoved")
def test_the_schedule_makes_a_backup_that_restores_and_sigterm_ends_it(
    built: Built, tmp_path: Path
) -> None:
    def inside(*words: str) -> str:
        done = built.engine.ask(built.engine.exec(NAME, *words))
        assert done.ok, done.output
        return done.stdout

    with world(tmp_path) as here:
        with role(built, here, Path("/var/tmp/backup")):
            until(
                lambda: any(
                    name.endswith("manifest.json.bin") for name in here.b2.objects("bucket")
                ),
                "the backup arrives",
                150,
            )
            until(lambda: "complete" in built.engine.ask(built.engine.argv("logs", NAME)).stdout)
            assert inside("/app/scripts/backup", "status").count(" ok ") == 4
            # No variable is written to a file, and no argv shows one.
            looked = inside("sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
            assert "/app/scripts/backup schedule" in looked
            wanted = "|".join(secret[:10] for secret in SECRETS)
            assert (
                inside(
                    "sh", "-c", f"grep -rlE '{wanted}' /etc /run /tmp /var /root /dev/shm || true"
                )
                == ""
            )
            began = time.monotonic()
            assert built.engine.ask(built.engine.argv("stop", "--time", "60", NAME)).ok
            assert time.monotonic() - began < 50  # it was not killed
            logs = built.engine.ask(built.engine.argv("logs", NAME))
            assert "stopping" in logs.stdout
        for secret in SECRETS:
            assert secret not in looked + logs.stdout + logs.stderr
        here.lose()
        here.backup("restore", BACKUP_PASSWORD=ENCRYPTION).ok()
        here.whole()
