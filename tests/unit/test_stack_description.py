"""The stack's description: compose.yaml, what a cluster is given, and what ``inv up`` runs, are the
same.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import podman_compose  # type: ignore[import-untyped]
import pytest
import yaml

from pipeline.core.errors import SecretsRefused
from pipeline.core.settings import ROOT, Settings
from pipeline.engines import podman_compose_main
from pipeline.engines.engine import Engine
from pipeline.stack import databases, health, secrets
from pipeline.stack.compose import PARTS, POD_VOLUMES, PODS, VOLUMES, Project, State
from pipeline.stack.health import Health, Volume
from pipeline.stack.lifecycle import PROBES
from tests.stack_up import named, pod_of, team

SECRETS = {
    "server.env": {
        "OPENCODE_SERVER_PASSWORD": "s",
        "FALKORDB_PASSWORD": "f",
        "VALKEY_PASSWORD": "v",
        "FALKORDB_ADMIN_PASSWORD": "fa",
        "VALKEY_ADMIN_PASSWORD": "va",
        "MODEL_KEY": "m",
    },
    "gateway.env": {"GATEWAY_PASSWORD": "g"},
    "backup.env": {"BACKUP_PASSWORD": "b"},
    "datadog.env": {"DD_API_KEY": "d"},
}


def red(home: Path, engine: Engine | None = None) -> Project:
    """Return a stack called red, whose secrets are in ``home``."""
    stack = {"name": "red", "port": 5000, "home": str(home)}
    for name, variables in SECRETS.items():
        text = "".join(f"{key}={value}\n" for key, value in variables.items())
        (home / name).write_text(text)
    return Project(
        engine or Engine("docker", "/d", "28"),
        Settings.model_validate({"stack": stack}),
        home,
        SECRETS,
        {part: f"localhost/{part}:1" for part in PARTS if part != "egress"},
    )


def services() -> dict[str, Any]:
    """Return the services of compose.yaml by part."""
    found = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    return {name.rpartition("opencode-")[2]: service for name, service in found.items()}


def create_arguments(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what podman-compose gives to ``podman create``, by part, and each part's variables."""
    for name, value in project.environment().items():
        monkeypatch.setenv(name, value)
    engine = replace(project.engine, name="podman")
    added = str(project.write_override())
    argv = engine.compose(
        [],
        databases.COMPOSE,
        "red",
        tmp_path / "server.env",
        *("--file", added, "up"),
    )
    compose = podman_compose.PodmanCompose()
    compose.commands = podman_compose.podman_compose.commands
    compose._parse_args(argv)
    compose._parse_compose_file()
    monkeypatch.setattr(podman_compose, "assert_cnt_nets", _nothing)
    monkeypatch.setattr(podman_compose, "assert_volume", _nothing)
    words, variables = {}, {}
    for container in compose.containers:
        part = container["_service"].rpartition("opencode-")[2]
        words[part] = asyncio.run(podman_compose_main.private_container_to_args(compose, container))
        (file,) = (word for word in words[part] if word.startswith("--env-file="))
        lines = Path(file.partition("=")[2]).read_text().splitlines()
        variables[part] = dict(line.split("=", 1) for line in lines)
    return words, variables


async def _nothing(*_: Any) -> None:
    return None


@pytest.mark.parametrize("components", [(), ("datadog",), ("restore",), ("datadog", "restore")])
def test_the_overlay_of_a_team_is_strictly_valid_kubernetes(
    tmp_path: Path, components: tuple[str, ...]
) -> None:
    documents = team(tmp_path, *components)
    kinds = {document["kind"] for document in documents}
    assert {
        "StatefulSet",
        "CronJob",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "Secret",
        "ConfigMap",
    } <= kinds
    assert {
        document["metadata"]["namespace"]
        for document in documents
        if document["kind"] != "Namespace"
    } == {"opencode-team"}
    server = named(documents, "StatefulSet", "opencode")["spec"]
    agent = server["template"]["spec"]["containers"][0]["env"][0]
    assert agent.get("value") == ("opencode-datadog" if "datadog" in components else None)
    restoring = "restore" in components
    assert server["replicas"] == (0 if restoring else 1)
    job = pod_of(documents, "backup")
    assert job["containers"][0]["args"] == (["restore"] if restoring else ["run", "--prune"])
    # Two pods share a volume that one node may mount: the server's, unless it does not run.
    assert ("affinity" in job) is not restoring


def test_each_part_is_closed_and_bounded() -> None:
    for part, service in services().items():
        assert service["cap_drop"] == ["ALL"]
        # The official image's program has this capability in its file, and does not start without.
        assert service.get("cap_add", []) == (["NET_BIND_SERVICE"] if part == "gateway" else [])
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service.get("read_only", False) is (part != "datadog")
        assert service["mem_limit"]
        assert service["pids_limit"] == 1024
        assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}
        # The databases are root without a capability: their fresh volumes are root's.
        users = {"falkordb": "0:0", "valkey": "0:0", "gateway": "0:0", "datadog": "100"}
        assert service["user"] == users.get(part, "1000:1000")
    assert services()["backup"]["entrypoint"] == ["/app/scripts/backup", "schedule"]


def test_compose_says_what_the_manifests_say(tmp_path: Path) -> None:
    documents = team(tmp_path, "datadog")
    settings = dict(
        line.split("=", 1)
        for line in (ROOT / "deploy/kubernetes/base/settings.env").read_text().splitlines()
        if not line.startswith("#")
    )
    for part, service in services().items():
        if part == "gateway":
            continue  # a cluster has an ingress controller
        pod = pod_of(documents, part)
        (container,) = pod["containers"]
        if part not in ("opencode", "backup"):  # an overlay has its own image of the server
            assert container["image"] == databases.wanted(Settings(), part)
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert service.get("read_only", False) == container["securityContext"].get(
            "readOnlyRootFilesystem", False
        )
        memory = container["resources"]["limits"]["memory"]
        assert service["mem_limit"] == memory.replace("Gi", "g").replace("Mi", "m")
        mounts = {mount["mountPath"] for mount in container.get("volumeMounts", [])}
        ours = {mount.partition(":")[2] for mount in service.get("volumes", [])}
        ours |= {mount.partition(":")[0] for mount in service.get("tmpfs", [])}
        assert ours == mounts
        if part in ("falkordb", "valkey"):
            assert [text.replace("$$", "$") for text in service["command"]] == container["args"]
            assert [word.replace("$$", "$") for word in service["healthcheck"]["test"][1:]] == (
                container["livenessProbe"]["exec"]["command"]
            )
            assert PROBES[part] == container["startupProbe"]["exec"]["command"][-1]
        if part in ("opencode", "backup"):
            assert "kubernetes/base/settings.env" in service["env_file"]
        given = {each["name"]: each.get("value") for each in container.get("env", [])}
        fixed = {name: value for name, value in service["environment"].items() if "${" not in value}
        fixed.pop("BACKUP_SCHEDULE", None)
        assert fixed.items() <= given.items()
    schedule = named(documents, "CronJob", "opencode-backup")["spec"]["schedule"]
    assert services()["backup"]["environment"]["BACKUP_SCHEDULE"] == schedule
    assert settings["FALKORDB_HOST"] in yaml.safe_load(databases.COMPOSE.read_text())["services"]


def test_each_part_is_given_its_own_secrets_and_no_argv_shows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, variables = create_arguments(red(tmp_path), tmp_path, monkeypatch)
    secrets_of = {value for some in SECRETS.values() for value in some.values()}
    held = {
        part: {name: value for name, value in given.items() if value in secrets_of}
        for part, given in variables.items()
    }
    assert held == {
        "falkordb": {"FALKORDB_PASSWORD": "fa", "FALKORDB_MEMORY_PASSWORD": "f"},
        "valkey": {"VALKEY_PASSWORD": "va", "VALKEY_MEMORY_PASSWORD": "v"},
        "opencode": {
            "OPENCODE_SERVER_PASSWORD": "s",
            "FALKORDB_PASSWORD": "f",
            "VALKEY_PASSWORD": "v",
            "MODEL_KEY": "m",
        },
        "gateway": {"OPENCODE_SERVER_PASSWORD": "s", "GATEWAY_PASSWORD": "g"},
        "backup": {"FALKORDB_PASSWORD": "fa", "VALKEY_PASSWORD": "va", "BACKUP_PASSWORD": "b"},
        "datadog": {"DD_API_KEY": "d"},
    }
    assert variables["opencode"]["FALKORDB_USERNAME"] == "memory"
    assert variables["opencode"]["FALKORDB_HOST"] == "opencode-falkordb"
    assert variables["opencode"]["DD_AGENT_HOST"] == "opencode-datadog"
    assert all("-e" not in each for each in words.values())
    assert all("--log-opt=max-size=10m" in each for each in words.values())


def test_only_the_gateway_is_published_and_on_loopback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, _ = create_arguments(red(tmp_path), tmp_path, monkeypatch)
    published = {part: each[each.index("-p") + 1] for part, each in words.items() if "-p" in each}
    assert published == {"gateway": "127.0.0.1:5000:4096"}
    assert {part: each[-1] for part, each in words.items()}["opencode"] == "localhost/opencode:1"
    names = {part: next(w for w in each if w.startswith("--name=")) for part, each in words.items()}
    assert {
        part: f"--name={red(tmp_path).container(part)}" for part in red(tmp_path).parts
    } == names


def test_the_backup_copies_the_volume_that_the_server_writes_to() -> None:
    state = "state:/root/.local/share/opencode"
    assert {part for part, each in services().items() if state in each.get("volumes", [])} == {
        "opencode",
        "backup",
    }


class Recorder(Engine):
    """An engine that runs nothing: ``volumes`` is what it lists, ``commands`` what it was asked."""

    volumes = ""
    commands: list[list[str]] = []  # noqa: RUF012

    def find_compose(self) -> list[str]:
        return ["compose"]

    def ask(self, argv: Any, **_: Any) -> Any:
        self.commands.append(list(argv))
        listing = self.volumes if "volume" in argv else ""
        return podman_result(listing, ok="inspect" not in argv)


def podman_result(stdout: str, *, ok: bool) -> Any:
    from pipeline.core.process import Completed

    return Completed((), 0 if ok else 1, stdout, "", 0.0)


@pytest.mark.parametrize(
    ("volumes", "bounded", "files"),
    [
        ("red_state", True, ["compose.yaml"]),
        ("state-red-0\nother", True, ["compose.yaml", "compose.pods.yaml"]),
        ("state-blue-0", False, ["compose.yaml", "compose.unbounded.yaml"]),
        ("red_state", True, ["compose.yaml", "compose.closed.yaml"]),
        ("red_state", True, ["compose.yaml", "compose.closed.yaml", "compose.models.yaml"]),
    ],
)
def test_which_files_are_used(tmp_path: Path, volumes: str, bounded: Any, files: list[str]) -> None:
    engine = Recorder("podman", "/p", "5.0", bounded=bounded)
    Recorder.volumes, Recorder.commands = volumes, []
    stack = red(tmp_path, engine)
    if "compose.closed.yaml" in files:
        egress = "models" if "compose.models.yaml" in files else "none"
        closed = stack.settings.stack.model_copy(update={"egress": egress})
        images = {**stack.images, **({"egress": "tinyproxy:1"} if egress == "models" else {})}
        settings = stack.settings.model_copy(update={"stack": closed})
        stack = replace(stack, settings=settings, images=images)
    stack.start("valkey", "opencode")
    argv = Recorder.commands[-1]
    given = [Path(argv[at + 1]).name for at, word in enumerate(argv) if word == "--file"]
    assert given == [*files, "compose.json"]
    assert argv[-5:] == ["up", "--detach", "--no-deps", "opencode-valkey", "opencode"]


def test_a_stack_of_pods_keeps_its_volumes_and_who_owns_them() -> None:
    described = yaml.safe_load(PODS.read_text())
    ours = yaml.safe_load(databases.COMPOSE.read_text())["volumes"]
    assert [f"{{}}_{name}" for name in ours] == list(VOLUMES)
    names = [pattern.format("${OPENCODE_STACK:-opencode}") for pattern in POD_VOLUMES]
    assert [each["name"] for each in described["volumes"].values()] == names
    assert names[0] == "state-${OPENCODE_STACK:-opencode}-0"
    assert {each["user"] for each in described["services"].values()} == {"1000:1000"}


def test_secrets_are_made_once_and_for_their_owner_alone(tmp_path: Path) -> None:
    home = tmp_path / "red"
    assert secrets.ensure(home, {}) == ["server.env", "gateway.env", "backup.env", "datadog.env"]
    first = secrets.read(home)
    assert {path.stat().st_mode & 0o777 for path in home.iterdir()} == {0o600}
    assert len({value for some in first.values() for value in some.values()}) == 7
    assert secrets.ensure(home, {}) == []
    assert secrets.ensure(home, {"DD_API_KEY": "k", "DD_SITE": ""}) == ["datadog.env"]
    assert secrets.ensure(home, {"DD_API_KEY": "another"}) == []
    assert secrets.read(home)["datadog.env"] == {"DD_API_KEY": "k"}
    with (home / "server.env").open("a") as file:
        file.write("OPENAI_API_KEY=sk-1\n")
    expected = first["server.env"] | {"OPENAI_API_KEY": "sk-1"}
    assert secrets.read(home)["server.env"] == expected


def test_an_empty_password_is_no_password(tmp_path: Path) -> None:
    path = tmp_path / "server.env"
    path.touch(0o600)
    path.write_text("OPENCODE_SERVER_PASSWORD=\n")
    with pytest.raises(SecretsRefused, match=r"server\.env has no OPENCODE_SERVER_PASSWORD"):
        secrets.check_passwords(secrets.read(tmp_path))
    secrets.ensure(tmp_path, {})
    secrets.check_passwords(secrets.read(tmp_path))


@pytest.mark.parametrize(
    ("mode", "text", "what"),
    [
        (0o644, "OPENCODE_SERVER_PASSWORD=x", "accessible by other users"),
        (0o600, 'VALKEY_PASSWORD=a"b', "a quote"),
        (0o600, "OPENAI_API_KEY=a$b", "a quote"),
    ],
)
def test_secrets_that_are_none_are_refused(tmp_path: Path, mode: int, text: str, what: str) -> None:
    path = tmp_path / "server.env"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(SecretsRefused, match=what):
        secrets.read(tmp_path)


def test_what_is_wrong_is_said_in_a_sentence_each() -> None:
    now = datetime.now(UTC)
    up = State(exists=True, running=True, since=now.isoformat())
    states = {
        "falkordb": State(exists=True, code=137, oom=True),
        "valkey": up,
        "opencode": up,
        "backup": State(),
    }
    answers = {
        "falkordb": {"state": "failing", "detail": "it hangs"},
        "datadog": {"state": "absent", "detail": ""},
    }
    volumes = [Volume("valkey", "/var/lib/opencode", 1, 95), Volume("opencode", "/workspace", 1, 5)]
    late = {"code": 60, "message": "Late: none"}
    found = list(health.problems(Health(states, answers, late, volumes)))
    assert [sentence.split(":")[0] for sentence in found] == [
        "falkordb ran out of memory",
        "backup is not running",
        "falkordb is failing",
        "the disk of valkey's /var/lib/opencode is 95% full",
        "backup",
    ]
    since = {
        part: f"{now - timedelta(hours=ago):%Y-%m-%dT%H:%M:%S}.123456789Z"
        for part, ago in (("valkey", 2), ("opencode", 0))
    }
    again = {
        part: State(exists=True, running=True, restarts=2, since=moment)
        for part, moment in since.items()
    }
    (recent,) = health.problems(Health(again, {}, {"code": 0}, volumes[1:]))
    assert recent.startswith("opencode has restarted 2 times")


def test_no_pod_reaches_metadata_or_private_addresses_but_for_traces(tmp_path: Path) -> None:
    policies = [each for each in team(tmp_path) if each["kind"] == "NetworkPolicy"]
    agent = {4318, 8125, 8126}
    checked = 0
    for policy in policies:
        for rule in policy["spec"].get("egress") or []:
            blocks = [peer["ipBlock"] for peer in rule["to"] if "ipBlock" in peer]
            everywhere = [block for block in blocks if block["cidr"] == "0.0.0.0/0"]
            ports = {port["port"] for port in rule.get("ports", [])}
            if everywhere and ports != agent:
                checked += 1
                assert {"10.0.0.0/8", "169.254.0.0/16"} <= set(everywhere[0]["except"])
    assert checked == 2
