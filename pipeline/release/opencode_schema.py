"""The JSON schema of OpenCode's configuration, as a given version of OpenCode prints it."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from pipeline.core.errors import BaseUnavailable, BumpFailed
from pipeline.core.settings import Settings
from pipeline.engines import detect
from pipeline.inputs import base
from pipeline.release.package_managers import npm

REFERENCE = "#/components/schemas/"


def generate(settings: Settings, name: str, version: str) -> str:
    """Return the schema that OpenCode's binary package ``name`` prints, as JSON.

    npm downloads and verifies the package. It runs in a container without a network.
    Raises NoEngine, EngineBroken, BaseUnavailable, SourcesUnreachable, BumpFailed.
    """
    engine = detect.of(settings)
    image = base.here(engine, settings)
    if image is None:
        raise BaseUnavailable("the base image is not on this machine", "Get it: inv base")
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        npm(
            settings,
            "install",
            "--ignore-scripts",
            f"{name}@{version}",
            cwd=directory,
        )
        directory.chmod(0o755)  # the container may run as another user
        argv = engine.run(
            image.reference,
            f"/new/{name}/bin/opencode",
            "generate",
            hardened=False,
            rm=True,
            network="none",
            volume=f"{directory}/node_modules:/new:ro",
        )
        result = engine.ask(argv)
    try:
        return schema_of(json.loads(result.stdout), version)
    except (ValueError, KeyError) as error:
        what = f"opencode {version} does not print its schema"
        raise BumpFailed(
            what,
            "Keep the older version until it does.",
            result.output,
        ) from error


def schema_of(document: dict[str, Any], version: str) -> str:
    """Return the configuration's schema out of OpenCode's OpenAPI ``document``, as JSON.

    Every schema that it refers to is under ``$defs``.
    """
    text = json.dumps(document["components"]["schemas"])
    schemas = json.loads(text.replace(REFERENCE, "#/$defs/"))
    needed: dict[str, Any] = {}

    def collect(schema: object) -> None:
        for name in re.findall(r'"#/\$defs/([^"]+)"', json.dumps(schema)):
            if name not in needed:
                needed[name] = schemas[name]
                collect(schemas[name])

    collect(schemas["Config"])
    source = f"components.schemas.Config of GET /doc, opencode {version}"
    schema = {
        "$comment": f"{source}: the server ignores keys that it does not know",
        **schemas["Config"],
        "$defs": dict(sorted(needed.items())),
    }
    return json.dumps(schema, indent=1) + "\n"
