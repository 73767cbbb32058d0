"""The project at /workspace: which directory, as whom, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import ProjectRefused
from pipeline.core.settings import Settings
from pipeline.engines.engine import Engine
from pipeline.inputs import ca
from pipeline.stack import git, overrides, workspace
from pipeline.stack.compose import Project, State
from pipeline.stack.workspace import Workspace
from tests.unit.test_stack_description import create_arguments, red

ENGINE = Engine("podman", "/p", "5.0")


def stack(project: str = "") -> Settings:
    return Settings.model_validate({"stack": {"project": project}})


def test_a_directory_is_remembered_until_another_is_chosen(tmp_path: Path) -> None:
    home, one, two = tmp_path / "home", tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    assert workspace.recorded(ENGINE, home) == Workspace(None, "1000:1000")
    workspace.choose(stack(), home, str(one))
    workspace.choose(stack(), home, "")
    owner = one.stat()
    expected = Workspace(one, f"{owner.st_uid}:{owner.st_gid}")
    assert workspace.recorded(ENGINE, home) == expected
    rootless = replace(ENGINE, rootless=True)
    assert workspace.recorded(rootless, home) == Workspace(one, "0:0")
    workspace.choose(stack(str(two)), home, "")
    assert workspace.recorded(ENGINE, home).directory == two
    workspace.choose(stack(str(two)), home, "volume")
    assert workspace.recorded(ENGINE, home).directory is None


def test_what_is_no_place_to_work_is_refused(tmp_path: Path) -> None:
    main, linked = tmp_path / "main", tmp_path / "linked"
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
    for argv in (
        ["init", "-q", str(main)],
        ["-C", str(main), *identity, "commit", "-q", "--allow-empty", "-m", "one"],
        ["-C", str(main), "worktree", "add", "-q", str(linked)],
    ):
        subprocess.run(["git", *argv], check=True, capture_output=True)
    workspace.check(main)
    with pytest.raises(ProjectRefused, match="linked git work tree") as caught:
        workspace.check(linked)
    assert f"inv up --project {main}." in str(caught.value)
    with pytest.raises(ProjectRefused, match="is not a directory"):
        workspace.check(tmp_path / "none")
    (tmp_path / "a:b").mkdir()
    with pytest.raises(ProjectRefused, match="colon"):
        workspace.check(tmp_path / "a:b")


def test_a_directory_of_another_user_is_refused_unless_root_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ProjectRefused, match=r"belongs to .*, not to you"):
        workspace.check(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: owner)
    workspace.check(tmp_path)


def test_a_part_of_a_repository_is_taken_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "part").mkdir()
    workspace.check(tmp_path / "part")
    output = capsys.readouterr()
    assert f"the repository is {tmp_path}" in output.out + output.err


def test_the_project_replaces_the_volume_and_its_owner_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "a $HOME"
    directory.mkdir()
    project = replace(red(tmp_path), workspace=Workspace(directory, "7:8"))
    words, _ = create_arguments(project, tmp_path, monkeypatch)
    for part in ("opencode", "backup"):
        given = words[part]
        assert given[given.index("-u") + 1] == "7:8"
    mounts = [words["opencode"][at + 1] for at, w in enumerate(words["opencode"]) if w == "-v"]
    assert f"{directory}:/workspace:z" in mounts
    assert len([mount for mount in mounts if ":/workspace" in mount]) == 1


def test_a_change_of_settings_is_seen_and_that_of_another_part_is_not(tmp_path: Path) -> None:
    project = red(tmp_path)
    path = project.write_override()
    added = json.loads(path.read_text())["services"]
    digests = {
        part: added[name]["labels"][overrides.LABEL]
        for part, name in (("opencode", "opencode"), ("backup", "opencode-backup"))
    }
    server = {**project.secrets["server.env"], "KEY": "new"}
    other = {**project.secrets, "server.env": server}
    later = replace(project, secrets=other)
    for part, changes in (("opencode", True), ("backup", False)):
        assert not project.changed(part, State(settings=digests[part]))
        assert later.changed(part, State(settings=digests[part])) is changes
    assert not project.changed("valkey", State())
    assert project.changed("opencode", State())


def test_a_url_with_a_password_is_not_cloned() -> None:
    with pytest.raises(ProjectRefused, match="has a password") as caught:
        git.clone(ENGINE, "opencode", "https://me:hidden@example.com/x")
    assert "hidden" not in str(caught.value)


def test_the_cas_of_the_network_are_trusted_in_the_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = red(tmp_path)
    for name in ca.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert services_of(project)["opencode"]["environment"] == {}
    assert not list(tmp_path.glob("ca-*"))

    own = tmp_path / "own.crt"
    words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    words += ["-keyout", str(tmp_path / "key"), "-out", str(own), "-subj", "/CN=ours"]
    subprocess.run(["openssl", *words], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(own))
    project = red(tmp_path)
    found = services_of(project)
    (bundle,) = tmp_path.glob("ca-*.crt")
    assert bundle.stat().st_mode & 0o777 == 0o644
    assert own.read_text().strip() in bundle.read_text()
    assert bundle.read_text().count("BEGIN CERTIFICATE") > 100  # the public ones too
    for part in ("opencode", "backup"):
        assert f"{bundle}:/etc/opencode/ca/ca.crt:ro,z" in found[part]["volumes"]
        assert found[part]["environment"]["NODE_EXTRA_CA_CERTS"] == "/etc/opencode/ca/ca.crt"


def services_of(project: Project) -> dict[str, Any]:
    """Return what the file next to the secrets adds to compose.yaml, by part."""
    written = json.loads(project.write_override().read_text())["services"]
    return {name.rpartition("opencode-")[2]: service for name, service in written.items()}
