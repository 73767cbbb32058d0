"""What the image's own scripts say, asked inside a container of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from pipeline.core.settings import ROOT
from pipeline.engines.container import SECRET, running
from tests.conftest import PODMAN, Built
from tests.image.conftest import derive

pytestmark = pytest.mark.engine

AWKWARD = 'it\'s "quoted" \\ $HOME `id` #%: '


@pytest.mark.parametrize(
    ("built", "password"),
    [("docker", ""), ("podman", AWKWARD)],
    ids=["docker-open", "podman-awkward password"],
    indirect=["built"],
)
@pytest.mark.usefixtures("unmoved")
def test_status_and_the_health_check_get_in(built: Built, password: str) -> None:
    with running(built.engine, built.inspect()["Id"], password=password) as container:
        container.wait_ready(60)
        assert container.server
        stranger = replace(container.server, password="")
        assert stranger.get("/config").status_code == (401 if password else 200)

        status = container.exec("/app/scripts/status", "--json")
        assert status.ok, status.output
        states = {name: part["state"] for name, part in json.loads(status.stdout)["parts"].items()}
        assert (states["server"], states["falkordb"], states["valkey"]) == (
            "ok",
            "absent",
            "absent",
        )

        image = built.inspect()
        command = (image["Config"].get("Healthcheck") or image["Healthcheck"])["Test"][-1]
        assert built.engine.ask(built.engine.healthcheck(container.name, command)).ok
        if password:
            wrong = container.exec("env", f"{SECRET}=wrong", "sh", "-c", command)
            assert not wrong.ok
            assert "401" in wrong.stderr


@PODMAN
@pytest.mark.usefixtures("unmoved")
def test_the_documented_image_of_ones_own_builds_and_serves(built: Built) -> None:
    (recipe,) = re.findall(
        r"FROM opencode-server\n(.+?)```", (ROOT / "docs/image.md").read_text(), re.DOTALL
    )
    agent = "---\ndescription: reviews\nmode: primary\n---\nYou review.\n"
    image = derive(built, "own", *recipe.splitlines(), files={"reviewer.md": agent})
    try:
        with running(built.engine, image) as container:
            container.wait_ready(60)
            assert container.server
            agents = container.server.get("/agent", timeout=60).json()
            assert "reviewer" in {each["name"] for each in agents}
            assert container.exec("tree", "--version").ok
    finally:
        built.engine.must("rmi", "--force", image)
