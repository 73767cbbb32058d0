"""Canaries: a secret in each place where a contributor might leave one. The build refuses it, or
the scan finds it.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.image import contents, secret_scan
from pipeline.inputs import ca
from tests.conftest import Built
from tests.image.conftest import derive

pytestmark = pytest.mark.engine

# None of these is whole in this file: a scanner of this repository would find it too.
HEX = "0f1e2d3c" * 4
OPENAI = "sk-" + "proj-" + "a1B2" * 12
GITHUB = "ghp" + "_" + "a1B2" * 9
B2 = "K00" + "5" + "aB1/" * 6 + "cD3"
JWT = ".".join(("ey" + "JhbGciOiJIUzI1NiJ9", "ey" + "JzdWIiOiIxMjM0NTY3ODkwIn0", "x1Y2" * 8))
KEY = "-----BEGIN PRIVATE" + " KEY-----\n" + "QUJD" * 16 + "\n"

REFUSED = (
    *(
        ".env",
        ".env.local",
        ".envrc",
        ".npmrc",
        ".git/config",
        ".aws/credentials",
        ".docker/config.json",
    ),
    *(
        ".ssh/id_ed25519",
        "id_rsa",
        "tls/server.pem",
        "tls/server.key",
        "auth.json",
        "rclone.conf",
        ".bash_history",
    ),
)
"""What .dockerignore keeps out of the context, wherever it is."""


@contextlib.contextmanager
def planted(root: Path, *names: str) -> Iterator[None]:
    there = set(root.rglob("*"))
    try:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"{KEY}{OPENAI}")
        yield
    finally:
        for path in sorted({*root.rglob("*")} - there):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def test_what_could_hold_one_never_gets_into_the_context(built: Built) -> None:
    root = built.checkout.root
    with contextlib.ExitStack() as stack:
        for folder in ("vendor/OpenAgents", "vendor/OpenAgents/.opencode/agent", "scripts"):
            stack.enter_context(planted(root / folder, *REFUSED))
        done = built.inv("build")
    assert done.code == 0, done.stdout[-3000:] + done.stderr
    image = built.inspect()
    assert secret_scan.check(built.engine, image, {})[0] == []
    files = contents.read(built.engine, image, files=True)["files"]
    there = [
        path
        for path in files
        for name in REFUSED
        if path.startswith(("/opt/openagents", "/app")) and path.endswith(f"/{name}")
    ]
    assert there == []
    assert "/opt/openagents/.opencode" in files
    assert built.inv("build").code == 0


def test_what_gets_in_is_found_in_whatever_layer_and_setting_it_is(
    built: Built, office_ca: Path
) -> None:
    image = derive(
        built,
        "canaries",
        "ARG NPM_TOKEN",
        "RUN echo a build argument is in the history",
        f"ENV DD_API_KEY={HEX} FALKORDB_PASSWORD=hunter22",
        "LABEL deploy.token=letmein",
        "COPY leak.ts /opt/openagents/.opencode/plugin/",
        "COPY env /opt/openagents/.env",
        "COPY npmrc /root/.npmrc",
        "COPY upload /app/scripts/",
        "COPY opencode.json /root/.config/opencode/opencode.json",
        f"RUN echo {GITHUB} > /dev/null",
        "COPY key office.crt /srv/",
        "RUN rm /srv/key /srv/office.crt",
        f"RUN mkdir -p /root/.npm/_logs /root/.cache/pip; echo {JWT[:30]} > /var/log/setup",
        "COPY jwt /var/log/setup",
        "RUN rm -r /var/log/setup /root/.npm /root/.cache",
        files={
            "leak.ts": f'export const key = "{OPENAI}"\n',
            "env": "A=1\n",
            "npmrc": "//registry/:_authToken=x\n",
            "upload": f"rclone copy --b2-key {B2} /data b2:bucket\n",
            "opencode.json": f'{{"provider": {{"x": {{"options": {{"apiKey": "{HEX}"}}}}}}}}\n',
            "key": KEY,
            "jwt": f"token {JWT}\n",
            "office.crt": office_ca.read_text(),
        },
        build_args={"NPM_TOKEN": "hunter2hunter2"},
    )
    faults, _ = secret_scan.check(
        built.engine, built.inspect(image), ca.certificates(office_ca.read_text())
    )
    expected = {
        f"/opt/openagents/.opencode/plugin/leak.ts (holds {OPENAI[:12]}…)",
        "/opt/openagents/.env",
        "/root/.npmrc",
        f"/app/scripts/upload (holds {B2[:12]}…)",
        "/root/.config/opencode/opencode.json (holds apiKey=…)",
        f"/srv/key (holds {KEY[:12]}…)",
        "/srv/office.crt holds a CA of this network",
        "/root/.npm/_logs",
        "/root/.cache/pip",
        f"/var/log/setup (holds {JWT[:12]}…)",
        "the history holds NPM_TOKEN=…",
        "the history holds DD_API_KEY=0…",
        "the history holds FALKORDB_PASSWORD=…",
        "the history holds deploy.token=…",
        f"the history holds {GITHUB[:12]}…",
        "the configuration holds DD_API_KEY=0…",
        "the configuration holds FALKORDB_PASSWORD=…",
        "the configuration holds deploy.token=…",
    }
    assert set(faults) == expected
