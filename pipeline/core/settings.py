"""Settings: invoke.yaml and what overrides it, validated once and immutable."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from pipeline.core.errors import SettingRefused

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""

BUILD = ROOT / "build"
"""Where the tasks write records and reports. Git ignores it."""

INVOKE_SECTIONS = frozenset(
    {
        "run",
        "runners",
        "sudo",
        "tasks",
        "timeouts",
    }
)
"""Sections of the configuration that belong to Invoke itself."""

Seconds = Annotated[float, Field(gt=0, le=3600)]
Port = Annotated[int, Field(ge=0, le=65535)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Base(_Section):
    """Where ``node:20-slim`` comes from.

    ``mirrors`` are names without a tag: the digest in locks/base.json applies.
    """

    mirrors: tuple[str, ...] = ()
    make: Literal["auto", "never", "always"] = "auto"
    debian_mirror: str = ""


class OpenAgents(_Section):
    """What is fetched instead of the pin."""

    url: str = ""
    ref: str = ""


class Network(_Section):
    """Retries and timeouts of downloads.

    core/retry.py has the pauses between the attempts.
    """

    attempts: PositiveInt = 3
    stall_seconds: PositiveInt = 30


class Smoke(_Section):
    """Timeouts and the port of the smoke test."""

    ready_seconds: Seconds = 60
    request_seconds: Seconds = 5
    port: Port = 0


class Advisories(_Section):
    """The service that lists known vulnerabilities."""

    url: str = "https://api.osv.dev"
    seconds: Seconds = 10
    block: Literal["", "low", "moderate", "high", "critical"] = ""


class Nightly(_Section):
    """What a nightly run updates and how many builds it keeps."""

    bump: str = "openagents base npm python"
    refresh_days: PositiveInt = 7
    keep: PositiveInt = 7


class Notify(_Section):
    """Who is notified of releases and failures."""

    command: str = ""
    webhook: str = ""
    datadog: bool = False
    seconds: Seconds = 60


MODEL_HOSTS = (
    "api.anthropic.com api.openai.com generativelanguage.googleapis.com openrouter.ai opencode.ai"
)


class Stack(_Section):
    """What ``inv up`` starts.

    An image that is empty here is the one in deploy/.
    """

    name: str = Field("opencode", pattern=r"^[a-z][a-z0-9-]{1,30}$")
    address: str = Field("127.0.0.1", pattern=r"^[0-9.]+$")
    port: Port = 4096
    project: str = ""
    host: str = Field("", pattern=r"^[a-z0-9.-]*$")
    tls: Literal["none", "internal", "acme"] = "none"
    egress: Literal["open", "models", "none"] = "open"
    egress_hosts: str = Field(MODEL_HOSTS, pattern=r"^[A-Za-z0-9. -]*$")
    home: str = ""
    falkordb: str = ""
    valkey: str = ""
    gateway: str = ""
    agent: str = ""
    proxy: str = ""
    ready_seconds: Seconds = 120


class Settings(_Section):
    """Every setting; invoke.yaml documents each."""

    engine: Literal["auto", "podman", "docker"] = "auto"
    image: str = Field("opencode-server", pattern=r"^[a-z0-9]+([._/-][a-z0-9]+)*$")
    ca: str = ""
    packages: str = Field("", pattern=r"^[a-z0-9+.:=~ -]*$")
    platform: Literal["", "linux/amd64", "linux/arm64"] = ""
    base: Base = Base()
    openagents: OpenAgents = OpenAgents()
    network: Network = Network()
    smoke: Smoke = Smoke()
    advisories: Advisories = Advisories()
    nightly: Nightly = Nightly()
    notify: Notify = Notify()
    stack: Stack = Stack()


def load(config: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings in Invoke's merged ``config``; check the variables of ``environ`` too.

    Raises SettingRefused, which names each unknown key and each invalid value.
    """
    check_environment(environ)
    return _validated({key: value for key, value in config.items() if key not in INVOKE_SECTIONS})


def check_environment(environ: Mapping[str, str] = os.environ) -> None:
    """Check the names and values of ``INVOKE_*`` variables. Raises SettingRefused.

    Invoke ignores unknown variables, and ends with a traceback on a value of the wrong type.
    """
    values: dict[str, Any] = {}
    for name in environ:
        variable = name.removeprefix("INVOKE_").lower()
        section, _, key = variable.partition("_")
        if not name.startswith("INVOKE_") or section in INVOKE_SECTIONS | {"debug", "runtime"}:
            continue
        if key and isinstance(getattr(Settings(), section, None), _Section):
            values.setdefault(section, {})[key] = environ[name]
        else:
            values[variable] = environ[name]
    _validated(values, "INVOKE_", "_")


def _validated(
    values: dict[str, Any],
    prefix: str = "",
    separator: str = ".",
) -> Settings:
    """Return ``values`` as settings. Raises SettingRefused, which names them with the separator."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            name = separator.join(map(str, fault["loc"]))
            unknown = fault["type"] == "extra_forbidden"
            reason = "unknown setting" if unknown else fault["msg"]
            faults.append(f"{prefix}{name.upper() if prefix else name}: {reason}")
        raise SettingRefused(
            "; ".join(faults), "Correct or remove it; invoke.yaml documents every setting."
        ) from error
