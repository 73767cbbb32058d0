"""``deploy/kubernetes`` as one machine can play it: each workload of it as a pod.

podman plays pods, not StatefulSets and CronJobs, and of what a pod may refer to it knows less than a cluster (4.3 reads
no key of a Secret that it was given itself, and no ``status.hostIP``). So references are replaced by what they refer
to; everything else is handed on as it is written there.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.settings import ROOT

Document = dict[str, Any]

KUBERNETES = ROOT / "deploy" / "kubernetes"
FOLDERS = ("base", "datadog")

PARTS = ("falkordb", "valkey", "opencode", "backup", "datadog")
"""In the order in which they are started; the names of their containers."""

CRON_CAPABILITIES = ["SETGID", "SETUID"]
CRON_ROOM = {"run": "/run", "crontabs": "/var/spool/cron/crontabs"}


@dataclass(frozen=True)
class Manifests:
    """The documents of ``deploy/kubernetes``, and the settings that its kustomization makes a ConfigMap of."""

    documents: tuple[Document, ...]
    settings: Mapping[str, str]

    @classmethod
    def read(cls, root: Path = KUBERNETES) -> Manifests:
        """Read them."""
        import yaml

        documents: list[Document] = []
        for folder in FOLDERS:
            listed = yaml.safe_load((root / folder / "kustomization.yaml").read_text())
            for name in listed["resources"]:
                documents += yaml.safe_load_all((root / folder / name).read_text())
        return cls(tuple(documents), read_env(root / "base" / "settings.env"))

    def workload(self, part: str) -> Document:
        """Return the StatefulSet, Deployment or CronJob that has this part's container."""
        return next(each for each in self.documents if part in [container["name"] for container in _containers(each)])

    def image(self, part: str) -> str:
        """Return the image that is written there for a part."""
        return str(_containers(self.workload(part))[0]["image"])

    def probe(self, part: str) -> list[str]:
        """Return the command whose success means that a part is ready; empty where there is none."""
        probe = _containers(self.workload(part))[0].get("startupProbe") or {"exec": {"command": []}}
        return list(probe["exec"]["command"])


@dataclass(frozen=True)
class Stack:
    """What one machine's stack differs by: its name, where it listens, its images, its secrets by Secret and key.

    ``bounded``: the engine can bound what its parts take.
    """

    name: str
    address: str
    port: int
    images: Mapping[str, str]
    secrets: Mapping[str, Mapping[str, str]] = field(repr=False)
    agent: bool = False
    bounded: bool = True

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that it has; the Agent only with a key."""
        return tuple(part for part in PARTS if part != "datadog" or self.agent)

    def renamed(self, name: str) -> str:
        """Return a name of the manifests as this stack's: ``opencode-valkey`` of a stack ``red`` is ``red-valkey``."""
        return re.sub(r"(?<![a-z])opencode(?![a-z])", self.name, name)


@dataclass(frozen=True)
class Pod:
    """A pod that podman can play: ``volumes`` are those that last, ``scratch`` those that do not, by their names."""

    part: str
    name: str
    document: Document = field(repr=False)
    volumes: Mapping[str, str]
    scratch: tuple[str, ...]

    @property
    def container(self) -> str:
        """The engine's name of its one container."""
        return f"{self.name}-{self.part}"

    def text(self) -> str:
        """Return it as podman reads it; JSON is YAML."""
        return json.dumps(self.document)


def _template(document: Document) -> Document:
    spec: Document = document.get("spec") or {}
    return dict((spec["jobTemplate"]["spec"] if document["kind"] == "CronJob" else spec).get("template") or {})


def _containers(document: Document) -> list[Document]:
    return list(_template(document).get("spec", {}).get("containers", []))


def pods(manifests: Manifests, stack: Stack) -> list[Pod]:
    """Return the stack's pods, in the order in which they are started."""
    return [pod(manifests, stack, part) for part in stack.parts]


def pod(manifests: Manifests, stack: Stack, part: str) -> Pod:
    """Return the pod of one part."""
    workload = manifests.workload(part)
    template = copy.deepcopy(_template(workload))
    spec, name = template["spec"], stack.renamed(workload["metadata"]["name"])
    container = spec["containers"][0]
    # Only what is here already: up has seen to it, and a registry is not asked on the way.
    container.update(image=stack.images.get(part, ""), imagePullPolicy="Never")
    environ = dict(_environment(container, manifests, stack, part))
    if workload["kind"] == "CronJob":
        environ |= _scheduled(workload, spec, container)
    container.pop("envFrom", None)
    container["env"] = [{"name": key, "value": value} for key, value in environ.items()]
    if part == "opencode":
        for port in container["ports"]:
            port.update(hostPort=stack.port, hostIP=stack.address)
    else:
        # podman 4.3 publishes each containerPort on every address of the host. Within a network none is needed.
        container.pop("ports", None)
    spec["restartPolicy"] = "Always"
    spec.pop("affinity", None)
    limits = container["resources"]["limits"]
    for kind in ("cpu",) if stack.bounded else ("cpu", "memory"):
        limits.pop(kind, None)  # a rootless podman may bound memory and have no say in CPUs
    claims = [each["metadata"]["name"] for each in workload["spec"].get("volumeClaimTemplates", [])]
    volumes = spec.setdefault("volumes", [])
    volumes += [
        {"name": claim, "persistentVolumeClaim": {"claimName": f"{claim}-{workload['metadata']['name']}-0"}}
        for claim in claims
    ]
    scratch = _name_volumes(spec, container, stack, name)
    lasting = {
        each["persistentVolumeClaim"]["claimName"]: mount["mountPath"]
        for each in volumes
        for mount in container.get("volumeMounts", [])
        if mount["name"] == each["name"] and "persistentVolumeClaim" in each
    }
    metadata = {"name": name, "labels": {**template["metadata"]["labels"], "opencode-server.stack": stack.name}}
    document = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
    return Pod(part, name, document, lasting, scratch)


def claim(volume: str) -> str:
    """Return the claim of a volume, as podman reads it: it belongs to the user that all parts run as."""
    owner = {"volume.podman.io/uid": "1000", "volume.podman.io/gid": "1000"}
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    metadata = {"name": volume, "annotations": owner}
    return json.dumps({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec})


def _environment(container: Document, manifests: Manifests, stack: Stack, part: str) -> Iterator[tuple[str, str]]:
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            yield from ((key, stack.renamed(value)) for key, value in manifests.settings.items())
        else:
            yield from stack.secrets.get(source["secretRef"]["name"], {}).items()
    for variable in container.get("env", []):
        origin = variable.get("valueFrom", {})
        if "value" in variable:
            yield variable["name"], variable["value"]
        elif secret := origin.get("secretKeyRef"):
            yield variable["name"], stack.secrets[secret["name"]].get(secret["key"], "")
        elif variable["name"] == "DD_AGENT_HOST" and stack.agent and part == "opencode":
            yield variable["name"], stack.renamed("opencode-datadog")


def _scheduled(workload: Document, spec: Document, container: Document) -> dict[str, str]:
    """Make of a job that a cluster starts the role that starts it itself, by the image's own cron (docs/backup.md)."""
    container["command"] = ["/app/scripts/backup-cron"]
    container.pop("args", None)
    user = spec["securityContext"]
    owner = f"{user['runAsUser']}:{user['runAsGroup']}"
    spec["securityContext"] = {"runAsUser": 0, "runAsGroup": 0}
    container["securityContext"]["capabilities"]["add"] = CRON_CAPABILITIES
    spec["volumes"] += [{"name": name, "emptyDir": {}} for name in CRON_ROOM]
    container["volumeMounts"] += [{"name": name, "mountPath": path} for name, path in CRON_ROOM.items()]
    return {"BACKUP_SCHEDULE": workload["spec"]["schedule"], "BACKUP_USER": owner}


def _name_volumes(spec: Document, container: Document, stack: Stack, pod: str) -> tuple[str, ...]:
    """Give each volume a name of this pod's: podman 4.3 makes a volume of each emptyDir, called as it is here."""
    scratch, names = [], {}
    for volume in spec["volumes"]:
        if "persistentVolumeClaim" in volume:
            source = volume["persistentVolumeClaim"]
            source["claimName"] = stack.renamed(source["claimName"])
        else:
            names[volume["name"]] = volume["name"] = f"{pod}-{volume['name']}"
            scratch.append(volume["name"])
    for mount in container.get("volumeMounts", []):
        mount["name"] = names.get(mount["name"], mount["name"])
    return tuple(scratch)


def read_env(path: Path) -> dict[str, str]:
    """Return the variables of a file as kustomize, podman and docker read it: NAME=value lines and # comments."""
    lines = (line.strip() for line in path.read_text().splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name.strip(): value for name, _, value in pairs}
