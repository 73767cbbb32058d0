"""What is inside an image by its own word, and by that of other tools; and what two engines make of
the same locks.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest

from pipeline.image import contents, diff
from pipeline.smoke.server_probes import pinned_version
from tests.conftest import IMAGE, Built, Checkout, build_once
from tests.image.conftest import derive
from tests.servers import free_port

pytestmark = pytest.mark.engine

PODMAN = pytest.mark.parametrize("built", ["podman"], indirect=True)


def asked(built: Built, *command: str) -> str:
    """What a command prints in a container of its own."""
    words = ["run", "--rm", *built.engine.limits, "--network", "none", "--entrypoint", command[0]]
    done = built.engine.ask(built.engine.argv(*words, built.reference, *command[1:]))
    assert done.ok, done.output
    return done.stdout


def test_contents_are_true(built: Built) -> None:
    done = built.inv("contents", "--no-sbom", env={"INVOKE_ADVISORIES_URL": ""})
    assert done.code == 0, done.stdout + done.stderr
    manifest = json.loads((built.checkout.root / "build/contents.json").read_text())
    image = built.inspect()
    assert manifest["bytes"] == image["Size"]
    assert manifest["openagents"]["kind"] == "openagents"
    assert manifest["system"].startswith("Debian GNU/Linux 12 (bookworm), 12.")
    packages = manifest["packages"]
    assert {name: entry[0] for name, entry in packages["debian"].items()} == dict(
        line.split()
        for line in asked(built, "dpkg-query", "-W", "-f", "${Package} ${Version}\\n").splitlines()
    )
    script = "/usr/bin/python3 -m pip --python /opt/venv list --format json; npm ls --global --json; node --version"
    listed, tree, node = re.fullmatch(
        r"(\[.*\])\n(\{.*\})\n(v.*)\n", asked(built, "sh", "-c", script), re.DOTALL
    ).groups()  # type: ignore[union-attr]
    python = {package["name"]: package["version"] for package in json.loads(listed)}
    assert {name: entry[0] for name, entry in packages["python"].items()}.items() >= python.items()
    npm = {name: entry["version"] for name, entry in json.loads(tree)["dependencies"].items()}
    assert {name: entry[0] for name, entry in packages["npm"].items()}.items() >= npm.items()
    assert npm["opencode-ai"] == pinned_version()
    assert manifest["node"] == node
    # OpenCode is one binary of its own size, and numpy the largest of Python's packages.
    assert packages["npm"]["opencode-ai"][1] > 150_000_000
    assert max(packages["python"], key=lambda name: packages["python"][name][1]) == "numpy"


@PODMAN
def test_contents_writes_a_bill_of_materials_that_agrees(built: Built) -> None:
    env = {"INVOKE_ADVISORIES_URL": f"http://127.0.0.1:{free_port()}"}
    done = built.inv("contents", env=env)
    assert done.code == 0, done.stdout + done.stderr
    assert f"no answer from {env['INVOKE_ADVISORIES_URL']} (ConnectionError)" in done.stdout
    home = built.checkout.root / "build"
    bill = json.loads((home / "sbom.spdx.json").read_text())
    assert bill["spdxVersion"].startswith("SPDX-2.")
    purls = {
        unquote(reference["referenceLocator"].partition("?")[0])
        for package in bill["packages"]
        for reference in package.get("externalRefs", [])
        if reference["referenceType"] == "purl"
    }
    packages = json.loads((home / "contents.json").read_text())["packages"]
    assert {purl.split("/")[2].split("@")[0] for purl in purls if purl.startswith("pkg:deb/")} == {
        *packages["debian"]
    }
    pypi = {purl.split("/")[1].split("@")[0] for purl in purls if purl.startswith("pkg:pypi/")}
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in packages["python"]} <= pypi | {"pip"}
    assert f"pkg:npm/opencode-ai@{pinned_version()}" in purls


def test_diff_says_what_changed_on_one_screen(built: Built) -> None:
    other = derive(
        built,
        "differs",
        "ENV VALKEY_PORT=1",
        "LABEL more=1",
        'ENTRYPOINT ["true"]',
        "HEALTHCHECK NONE",
        "RUN echo new > /srv/new && rm /app/scripts/status && chmod 600 /app/scripts/health",
        "RUN rm -r /opt/venv/lib/python3*/site-packages/redis*",
        "RUN touch --date=@0 /etc/fstab && chown 1 /etc/profile",
    )
    done = built.inv("diff", built.reference, other, "--same")
    done.failed("NotTheSame", 38, "differ")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert len(lines) < 50
    assert "env VALKEY_PORT 6380 1" in lines
    assert "label more 1" in lines
    found = json.loads((built.checkout.root / "build/diff.json").read_text())
    assert [row[0] for row in found["settings"]] == [
        "entrypoint",
        "env VALKEY_PORT",
        "healthcheck",
        "label more",
    ]
    [(name, was, now)] = found["packages"]
    assert (name, now) == ("python redis", "")
    assert re.fullmatch(r"\d+(\.\d+)+", was)
    files = {
        path: what
        for path, (what, _) in found["files"].items()
        if "/site-packages/redis" not in path
    }
    assert files == {
        "/srv/new": "new",
        "/app/scripts/status": "gone",
        "/app/scripts/health": "mode",
        "/etc/profile": "owner",
    }
    assert "/etc/fstab" in found["times"]


@pytest.mark.usefixtures("engine_environment")
def test_the_same_locks_give_the_same_content(checkout: Checkout) -> None:
    """podman's image and docker's are two builds from the same checkout, neither of which saw the
    other's layers.
    """
    both = [build_once(checkout, name) for name in ("podman", "docker")]
    images = [built.inspect() for built in both]
    inside = [
        contents.read(built.engine, image, files=True)
        for built, image in zip(both, images, strict=True)
    ]
    found = diff.compare(*images, *inside)
    assert found.packages == []
    assert found.files == {}
    assert len(inside[0]["files"]) > 10_000
    # COPY sets the time of the directories that it adds to, and the engine that of those that it
    # mounts something in.
    copied = "/usr/local/share/opencode-server"
    edited = ("/opt/openagents", "/app", "/root", "/workspace", copied)
    files = [
        path
        for path in found.times
        if not (path.startswith(edited) or inside[0]["files"][path][0][0] == "d")
    ]
    assert files == []
    assert [row for row in found.settings if not row[0].startswith("label ")] == []


def test_a_checkout_of_any_umask_and_place_gives_the_same_content(
    built: Built, tmp_path: Path
) -> None:
    """Unpacked by a zip program that keeps no modes, under umask 077, in a folder with any name."""
    odd = Checkout(
        tmp_path / "sp äö 100% (x)",
        {**built.checkout.env, "INVOKE_IMAGE": f"{IMAGE}-odd"},
        tmp_path / "aside",
    )
    ignore = shutil.ignore_patterns("build", "__pycache__")
    shutil.copytree(built.checkout.root, odd.root, symlinks=True, ignore=ignore)
    for path in [odd.root, *odd.root.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o700 if path.is_dir() else 0o600)
    done = odd.inv("build", "--engine", built.engine.name)
    assert done.code == 0, done.stdout[-3000:] + done.stderr
    images = built.inspect(), built.inspect(built.engine.local(f"{IMAGE}-odd:candidate"))
    if images[0]["RootFS"] != images[1]["RootFS"]:
        inside = [contents.read(built.engine, image, files=True) for image in images]
        assert diff.compare(*images, *inside).files == {}
    built.engine.must("rmi", built.engine.local(f"{IMAGE}-odd:candidate"))


def test_an_image_without_python_cannot_be_looked_into(built: Built) -> None:
    done = built.inv(
        "contents", "--no-sbom", "--image", derive(built, "blind", "RUN rm /usr/bin/python3")
    )
    done.failed("ContentsUnreadable", 36, "cannot read the contents")


def test_an_image_that_is_not_here(built: Built) -> None:
    built.inv("diff", "candidate", "no-such-image:1").failed("NoSuchImage", 40, "no-such-image:1")
