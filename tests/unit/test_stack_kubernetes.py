"""A cluster's components: a project by clone, the network's CAs, and git's credentials."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.settings import ROOT
from tests.stack_up import named_prefix, pod_of, team

BUNDLE = "/etc/opencode/ca/ca.crt"


def run(*argv: str, cwd: Path, text: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "GIT_TERMINAL_PROMPT": "0", **env}
    return subprocess.run(
        argv, cwd=cwd, env=environ, input=text, capture_output=True, text=True, check=False
    )


def environment(container: dict[str, Any]) -> dict[str, Any]:
    """Return a container's variables; a name must not occur twice."""
    names = [each["name"] for each in container["env"]]
    assert len(set(names)) == len(names), names
    return {each["name"]: each.get("value") for each in container["env"]}


def test_the_components_add_to_each_other(tmp_path: Path) -> None:
    documents = team(tmp_path, "project", "ca", "datadog")
    server = pod_of(documents, "opencode")
    (container,) = server["containers"]
    (clone,) = server["initContainers"]
    assert clone["image"] == container["image"]
    assert clone["securityContext"] == container["securityContext"]
    given = environment(container)
    assert given["DD_AGENT_HOST"] == "opencode-datadog"
    assert given["GIT_SSH_COMMAND"] == environment(clone)["GIT_SSH_COMMAND"]
    names = {"CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "NODE_EXTRA_CA_CERTS", "PIP_CERT"}
    names |= {"REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"}
    assert {name for name, value in given.items() if value == BUNDLE} == names
    (backup,) = pod_of(documents, "backup")["containers"]
    assert environment(backup)["SSL_CERT_FILE"] == BUNDLE
    bundle = named_prefix(documents, "ConfigMap", "opencode-ca")["metadata"]["name"]
    for part in ("opencode", "backup"):
        pod = pod_of(documents, part)
        volumes = {each["name"]: each for each in pod["volumes"]}
        assert volumes["ca"]["configMap"]["name"] == bundle
        paths = {each["mountPath"] for each in pod["containers"][0]["volumeMounts"]}
        assert str(Path(BUNDLE).parent) in paths


def test_a_project_is_cloned_once_and_after_an_interruption(tmp_path: Path) -> None:
    (clone,) = pod_of(team(tmp_path, "project"), "opencode")["initContainers"]
    origin, work = tmp_path / "origin", tmp_path / "work"
    origin.mkdir()
    identity = ("-c", "user.name=Ada", "-c", "user.email=ada@example.com")
    (origin / "file").write_text("one\n")
    run("git", "init", "--quiet", cwd=origin)
    run("git", "add", "file", cwd=origin)
    assert run("git", *identity, "commit", "--quiet", "-m", "one", cwd=origin).returncode == 0
    # An ext4 volume has lost+found, and an interrupted clone leaves .clone.
    (work / "lost+found").mkdir(parents=True)
    (work / ".clone/.git").mkdir(parents=True)
    argv = [*clone["command"], *clone["args"]]
    assert "PROJECT_URL" in run(*argv, cwd=work).stderr
    done = run(*argv, cwd=work, PROJECT_URL=str(origin))
    assert done.returncode == 0, done.stderr
    assert (work / "file").read_text() == "one\n"
    assert sorted(path.name for path in work.iterdir()) == [".git", "file", "lost+found"]
    status = run("git", "status", "--porcelain", "--branch", cwd=work).stdout.splitlines()
    assert "...origin/" in status[0]
    assert not status[1:]
    (work / "file").write_text("mine\n")
    assert run(*argv, cwd=work, PROJECT_URL="/nowhere").returncode == 0
    assert (work / "file").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("url", "env", "password"),
    [
        ("https://github.com/a/b", {"GIT_TOKEN": "t=1="}, "t=1="),
        ("https://git.example.com:8443/a", {"GIT_TOKEN": "t"}, ""),
        (
            "https://git.example.com:8443/a",
            {"GIT_TOKEN": "t", "GIT_TOKEN_HOST": "git.example.com:8443"},
            "t",
        ),
        ("https://git.example.com/a", {"GIT_TOKEN": "t", "GIT_TOKEN_HOST": "example.com"}, ""),
        ("http://github.com/a/b", {"GIT_TOKEN": "t"}, ""),
        ("https://github.com/a/b", {}, ""),
    ],
)
def test_git_gets_the_token_for_its_host_alone(
    tmp_path: Path, url: str, env: dict[str, str], password: str
) -> None:
    helper = f"credential.helper={ROOT / 'scripts/git-credential-env'}"
    argv = ("git", "-c", helper, "credential", "fill")
    done = run(*argv, cwd=tmp_path, text=f"url={url}\n\n", GIT_ASKPASS="false", **env)
    found = [line for line in done.stdout.splitlines() if line.startswith("password=")]
    assert found == ([f"password={password}"] if password else [])
