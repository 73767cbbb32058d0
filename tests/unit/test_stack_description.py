"""The stack's description: what a cluster is given, what podman plays of it, and what Compose says, are the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.engine import Engine
from pipeline.errors import SecretsRefused
from pipeline.settings import ROOT
from pipeline.stack import health, secrets
from pipeline.stack.health import Health, Volume
from pipeline.stack.manifests import PARTS, Manifests, Pod, Stack, pod, pods
from pipeline.stack.runner import State

SECRETS = {
    "opencode-server": {"OPENCODE_SERVER_PASSWORD": "s", "FALKORDB_PASSWORD": "f", "VALKEY_PASSWORD": "v"},
    "opencode-backup": {"BACKUP_PASSWORD": "b"},
    "opencode-datadog": {"DD_API_KEY": "d"},
}
RED = Stack("red", "127.0.0.1", 5000, dict.fromkeys(PARTS, "localhost/an:image"), SECRETS, agent=True)
BIN = Path(sys.executable).parent


def container(played: Pod) -> dict[str, Any]:
    return dict(played.document["spec"]["containers"][0])


def environment(played: Pod) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container(played)["env"]}


def team(tmp_path: Path, *components: str) -> list[dict[str, Any]]:
    """Render a team's overlay, and have each document of it checked against the schema of Kubernetes."""
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    overlay = tmp_path / "deploy/kubernetes/team"
    for name in ("server.env", "backup.env", "datadog.env"):
        shutil.copy(overlay / f"{name}.example", overlay / name)
    with (overlay / "kustomization.yaml").open("a") as file:
        file.write(f"components: {json.dumps([f'../{name}' for name in components])}\n")
    rendered = subprocess.run(
        [BIN / "kubectl", "kustomize", overlay], capture_output=True, text=True, check=True
    ).stdout
    (tmp_path / "all.yaml").write_text(rendered)
    argv = [str(BIN / "kubernetes-validate"), "--strict", str(tmp_path / "all.yaml")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return list(yaml.safe_load_all(rendered))


def named(documents: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    return next(each for each in documents if (each["kind"], each["metadata"]["name"]) == (kind, name))


@pytest.mark.parametrize("components", [(), ("datadog",), ("restore",), ("datadog", "restore")])
def test_the_overlay_of_a_team_is_strictly_valid_kubernetes(tmp_path: Path, components: tuple[str, ...]) -> None:
    documents = team(tmp_path, *components)
    kinds = {document["kind"] for document in documents}
    assert {"StatefulSet", "CronJob", "NetworkPolicy", "PodDisruptionBudget", "Secret", "ConfigMap"} <= kinds
    assert {document["metadata"]["namespace"] for document in documents if document["kind"] != "Namespace"} == {
        "opencode-team"
    }
    server = named(documents, "StatefulSet", "opencode")["spec"]
    agent = server["template"]["spec"]["containers"][0]["env"][0]
    assert agent.get("value") == ("opencode-datadog" if "datadog" in components else None)
    restoring = "restore" in components
    assert server["replicas"] == (0 if restoring else 1)
    job = named(documents, "CronJob", "opencode-backup")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert job["containers"][0]["args"] == (["restore"] if restoring else ["run", "--prune"])
    # Two pods share a volume that one node may mount: the server's, unless it does not run.
    assert ("affinity" in job) is not restoring


def test_each_part_is_closed_and_bounded_in_the_cluster_and_as_podman_plays_it() -> None:
    for played in pods(Manifests.read(), RED):
        said = container(played)
        assert said["securityContext"]["capabilities"]["drop"] == ["ALL"]
        assert said["securityContext"]["allowPrivilegeEscalation"] is False
        assert said["securityContext"].get("readOnlyRootFilesystem", False) is (played.part != "datadog")
        assert said["resources"]["limits"]["memory"]
        assert (said["image"], said["imagePullPolicy"]) == ("localhost/an:image", "Never")
        assert "valueFrom" not in json.dumps(played.document)
        assert all("opencode" not in each for each in (*played.volumes, *played.scratch, played.name))
    alone = [each for each in RED.parts if each != "backup"]
    users = [pod(Manifests.read(), RED, part).document["spec"]["securityContext"]["runAsUser"] for part in alone]
    assert users == [1000, 1000, 1000, 100]


def test_only_the_server_is_published_and_on_loopback() -> None:
    ports = {each.part: container(each).get("ports", []) for each in pods(Manifests.read(), RED)}
    published = [(part, port["hostIP"], port["hostPort"]) for part, those in ports.items() for port in those]
    assert published == [("opencode", "127.0.0.1", 5000)]


@pytest.mark.parametrize("name", ["opencode", "opencode-2", "my-opencode", "red"])
def test_the_backup_copies_the_volume_that_the_server_writes_to(name: str) -> None:
    stack = replace(RED, name=name)
    server, backup = (pod(Manifests.read(), stack, part) for part in ("opencode", "backup"))
    assert set(server.volumes) & set(backup.volumes) == {f"state-{name}-0"}


def test_where_nothing_can_be_bounded_nothing_is() -> None:
    for bounded in (True, False):
        for played in pods(Manifests.read(), replace(RED, bounded=bounded)):
            limits = container(played)["resources"]["limits"]
            assert ("memory" in limits) is bounded
            assert "cpu" not in limits  # podman without root may bound memory and have no say in CPUs


def test_each_part_is_given_its_own_secrets_and_no_others() -> None:
    given = {each.part: environment(each) for each in pods(Manifests.read(), RED)}
    held = {
        part: {name for some in SECRETS.values() for name in some if name in variables}
        for part, variables in given.items()
    }
    assert held == {
        "falkordb": {"FALKORDB_PASSWORD"},
        "valkey": {"VALKEY_PASSWORD"},
        "opencode": {"OPENCODE_SERVER_PASSWORD", "FALKORDB_PASSWORD", "VALKEY_PASSWORD"},
        "backup": {"FALKORDB_PASSWORD", "VALKEY_PASSWORD", "BACKUP_PASSWORD"},
        "datadog": {"DD_API_KEY"},
    }
    assert given["opencode"]["FALKORDB_HOST"] == "red-falkordb"
    assert given["opencode"]["DD_AGENT_HOST"] == "red-datadog"
    assert (given["backup"]["BACKUP_USER"], given["backup"]["BACKUP_SCHEDULE"]) == ("1000:1000", "23 3 * * *")


def test_compose_says_what_the_manifests_say() -> None:
    manifests = Manifests.read()
    services = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    stack = Stack("opencode", "127.0.0.1", 4096, {part: manifests.image(part) for part in PARTS}, SECRETS, agent=True)
    for played in pods(manifests, stack):
        service, said = services[played.name], container(played)
        assert service["image"].partition(":-")[2].rstrip("}") == said["image"]
        assert service["cap_drop"] == ["ALL"]
        assert service.get("read_only", False) == said["securityContext"].get("readOnlyRootFilesystem", False)
        memory = said["resources"]["limits"]["memory"].replace("Gi", "g").replace("Mi", "m")
        assert service["mem_limit"] == memory
        mounts = {mount.partition(":")[2] for mount in service.get("volumes", [])} - {"/var/tmp"}  # not to be kept
        assert mounts == set(played.volumes.values())
        if "args" in said:
            assert [text.replace("$$", "$") for text in service["command"]] == said["args"]
            assert service["healthcheck"]["test"][1:] == [
                word.replace("$", "$$") for word in said["livenessProbe"]["exec"]["command"]
            ]
        fixed = {name: value for name, value in service["environment"].items() if "${" not in value}
        assert fixed.items() <= environment(played).items()


def test_secrets_are_made_once_and_for_their_owner_alone(tmp_path: Path) -> None:
    home = tmp_path / "red"
    assert secrets.ensure(home, {}) == ["server.env", "backup.env", "datadog.env"]
    first = secrets.read(home)
    assert {path.stat().st_mode & 0o777 for path in home.iterdir()} == {0o600}
    assert len({value for some in first.values() for value in some.values()}) == 4
    assert secrets.ensure(home, {}) == []
    assert secrets.ensure(home, {"DD_API_KEY": "k", "DD_SITE": ""}) == ["datadog.env"]
    assert secrets.ensure(home, {"DD_API_KEY": "another"}) == []
    assert secrets.read(home)["opencode-datadog"] == {"DD_API_KEY": "k"}
    with (home / "server.env").open("a") as file:
        file.write("OPENAI_API_KEY=sk-1\n")
    assert secrets.read(home)["opencode-server"] == first["opencode-server"] | {"OPENAI_API_KEY": "sk-1"}


@pytest.mark.parametrize(
    ("mode", "text", "what"),
    [
        (0o644, "OPENCODE_SERVER_PASSWORD=x", "can be read by others"),
        (0o600, "OPENCODE_SERVER_PASSWORD=", "is empty"),
        (0o600, 'VALKEY_PASSWORD=a"b', "a quote"),
    ],
)
def test_secrets_that_are_none_are_refused(tmp_path: Path, mode: int, text: str, what: str) -> None:
    path = tmp_path / "server.env"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(SecretsRefused, match=what):
        secrets.read(tmp_path)


def test_what_is_wrong_is_said_in_a_sentence_each() -> None:
    up = State(there=True, running=True)
    states = {"falkordb": State(there=True, code=137, oom=True), "valkey": up, "opencode": up, "backup": State()}
    answers = {"falkordb": {"state": "failing", "detail": "it hangs"}, "datadog": {"state": "absent", "detail": ""}}
    volumes = [Volume("valkey", "/var/lib/opencode", 1, 95), Volume("opencode", "/workspace", 1, 5)]
    found = list(health.faults(Health(states, answers, {}, volumes, {"code": 60, "said": "Late: none\nmore"})))
    assert [sentence.split(":")[0] for sentence in found] == [
        "falkordb is down, it was out of memory",
        "backup is not up",
        "falkordb is failing",
        "valkey's /var/lib/opencode lies on a disk that is 95 % full",
        "backup",
    ]
    now = datetime.now(UTC)
    since = {
        part: f"{now - timedelta(hours=ago):%Y-%m-%dT%H:%M:%S}.123456789Z"
        for part, ago in (("valkey", 2), ("opencode", 0))
    }
    again = {part: State(there=True, running=True, restarts=2, since=moment) for part, moment in since.items()}
    (recent,) = health.faults(Health(again, {}, {}, volumes[1:], {"code": 0, "said": "ok"}))
    assert recent.startswith("opencode has ended 2 times")


def test_podman_is_told_the_bounds_beside_or_within_what_its_user_has_said() -> None:
    limits = ("--ulimit", "nofile=1:1")
    old, new = (Engine("podman", "podman", version, limits=limits) for version in ("4.3.1", "5.2.0"))
    text, variable = old.containers_conf({"containers": {"tz": "local"}, "engine": {"runtime": "runc"}})
    assert variable == "CONTAINERS_CONF"
    assert 'tz = "local"' in text
    assert 'default_ulimits = ["nofile=1:1"]' in text
    assert 'runtime = "runc"' in text
    text, variable = new.containers_conf({"engine": {"runtime": "runc"}})
    assert (variable, text) == (
        "CONTAINERS_CONF_OVERRIDE",
        '[containers]\npids_limit = 1024\ndefault_ulimits = ["nofile=1:1"]\n',
    )
    given = {"engine": {"runtimes": {"runc": ["/usr/bin/runc"]}, "service_destinations": {"a b": {"uri": "ssh://x"}}}}
    said = tomllib.loads(old.containers_conf(given)[0])
    assert said["engine"] == given["engine"]
    assert "pids_limit" not in tomllib.loads(replace(old, bounded=False).containers_conf({})[0])["containers"]
