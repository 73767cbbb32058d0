"""An engine made of one JSON file: images with names, written as the real ones write them, whole or
not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core import process
from pipeline.engines.engine import Engine


@dataclass(frozen=True)
class StubEngine(Engine):
    """``store`` is the file: ``{"names": {name: ID}, "images": {ID: inspection}, "containers": {ID:
    image ID}}``.
    """

    def read(self) -> dict[str, Any]:
        path = Path(self.store)
        empty: dict[str, Any] = {"names": {}, "images": {}, "containers": {}}
        return json.loads(path.read_text()) if path.exists() else empty

    def write(self, said: dict[str, Any]) -> None:
        draft = Path(f"{self.store}.part")
        draft.write_text(json.dumps(said))
        os.replace(draft, self.store)  # noqa: PTH105 -- what a test that kills at each step counts

    def local(self, name: str) -> str:
        return name if name.startswith("sha256:") or ":" in name else f"{name}:latest"

    def image(self, reference: str) -> dict[str, Any] | None:
        said = self.read()
        key = reference.removeprefix("sha256:")
        found: dict[str, Any] | None = said["images"].get(key) or said["images"].get(
            said["names"].get(reference, "")
        )
        return found

    def tag(self, source: str, *names: str) -> None:
        said, image = self.read(), self.image(source)
        assert image, source
        for name in names:
            said["names"][name] = image["Id"].removeprefix("sha256:")
        self.write(said)

    def add(
        self,
        name: str,
        identity: str,
        *,
        kind: str = "openagents",
        commit: str = "a" * 40,
        created: str = "2026",
        layers: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        said = self.read()
        ours = (
            {"opencode-server.openagents.kind": kind, "opencode-server.openagents.commit": commit}
            if kind
            else {}
        )
        config = {"Labels": {**ours, **(labels or {})}}
        said["images"][identity] = {
            "Id": f"sha256:{identity}",
            "Size": 1000,
            "Created": created,
            "Config": config,
            "RootFS": {"Layers": list(layers)},
        }
        if name:
            said["names"][name] = identity
        self.write(said)
        return dict(said["images"][identity])

    def ask(self, argv: Sequence[str], **_: Any) -> process.Completed:
        said, out, code = self.read(), [], 0
        match list(argv[1:]):
            case ["images", "--quiet", "--no-trunc"]:
                out = [f"sha256:{identity}" for identity in said["images"]]
            case ["images", *_, template]:
                unnamed = [
                    (identity, "<none>:<none>")
                    for identity in said["images"]
                    if identity not in said["names"].values()
                ]
                for identity, name in [
                    *((identity, name) for name, identity in said["names"].items()),
                    *unnamed,
                ]:
                    line = template.replace("{{.Repository}}:{{.Tag}}", name).replace(
                        "{{.ID}}", f"sha256:{identity}"
                    )
                    out.append(line)
            case ["ps", *_]:
                out = list(said["containers"])
            case ["inspect", *_]:
                out = [f"sha256:{identity}" for identity in said["containers"].values()]
            case ["image", "inspect", *identities]:
                out = [
                    json.dumps(
                        [said["images"][each.removeprefix("sha256:")] for each in identities]
                    )
                ]
            case ["rmi", name]:
                identity = said["names"].pop(name, name)
                if identity not in said["names"].values():
                    del said["images"][identity]
                self.write(said)
            case other:
                raise AssertionError(other)
        return process.Completed(tuple(argv), code, "\n".join(out), "", 0.0)

    def tags(self, image: str = "opencode-server") -> dict[str, str]:
        return {
            name.partition(":")[2]: each
            for name, each in self.read()["names"].items()
            if name.startswith(f"{image}:")
        }
