"""Settings: read from ``invoke.yaml`` and what overrides it, validated once, frozen after that."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import SettingRefused

ROOT = Path(__file__).resolve().parent.parent
"""The repository."""

BUILD = ROOT / "build"
"""What the tasks write down: records, reports, summaries. Never committed."""

_INVOKE_OWN = frozenset({"run", "runners", "sudo", "tasks", "timeouts"})
_INVOKE_OWN_ENV = (*(f"INVOKE_{section.upper()}_" for section in _INVOKE_OWN), "INVOKE_DEBUG", "INVOKE_RUNTIME_CONFIG")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Base(_Section):
    """Where ``node:20-slim`` comes from."""

    mirrors: tuple[str, ...] = ()
    make: Literal["auto", "never", "always"] = "auto"
    debian_mirror: str = ""


class OpenAgents(_Section):
    """What is fetched instead of the pin."""

    url: str = ""
    ref: str = ""


class Network(_Section):
    """How patient fetches are."""

    attempts: int = Field(3, ge=1, le=20)
    stall_seconds: int = Field(30, ge=1, le=3600)


class Smoke(_Section):
    """How patient the smoke test is, in seconds, and its port (0: a free one)."""

    ready_seconds: float = Field(60, gt=0, le=3600)
    request_seconds: float = Field(5, gt=0, le=60)
    port: int = Field(0, ge=0, le=65535)


class Advisories(_Section):
    """Who is asked for known vulnerabilities, and how long an answer may take, in seconds."""

    url: str = "https://api.osv.dev"
    seconds: float = Field(10, gt=0, le=600)


class Nightly(_Section):
    """What a night bumps, how old the image may grow (days), and how many builds are kept."""

    bump: str = "openagents base npm python"
    refresh_days: int = Field(7, ge=1, le=3650)
    keep: int = Field(7, ge=1, le=1000)


class Notify(_Section):
    """Who is told of a release or a failure, and how long that may take, in seconds."""

    command: str = ""
    webhook: str = ""
    datadog: bool = False
    seconds: float = Field(60, gt=0, le=3600)


class Stack(_Section):
    """What ``up`` starts: its name, where it listens, where its secrets are, and which images it takes."""

    name: str = Field("opencode", pattern=r"^[a-z][a-z0-9-]{1,30}$")
    address: str = Field("127.0.0.1", pattern=r"^[0-9.]+$")
    port: int = Field(4096, ge=1, le=65535)
    home: str = ""
    falkordb: str = ""
    valkey: str = ""
    agent: str = ""
    ready_seconds: float = Field(120, gt=0, le=3600)


class Settings(_Section):
    """Every setting; ``invoke.yaml`` says what each means."""

    engine: Literal["auto", "podman", "docker"] = "auto"
    image: str = Field("opencode-server", pattern=r"^[a-z0-9]+([._/-][a-z0-9]+)*$")
    ca: str = ""
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
    """Return the settings in Invoke's merged ``config``; ``environ`` is checked too.

    Raises SettingRefused, naming each key that is unknown or has an impossible value.
    """
    check_environment(environ)
    try:
        return Settings.model_validate({key: value for key, value in config.items() if key not in _INVOKE_OWN})
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise SettingRefused(
            "; ".join(faults), "invoke.yaml lists every setting with what it may be; ~/.invoke.yaml counts too."
        ) from error


def check_environment(environ: Mapping[str, str] = os.environ) -> None:
    """Refuse an ``INVOKE_*`` variable that is no setting, or whose value cannot be one. Raises SettingRefused.

    Invoke itself ignores the one, and meets the other with a traceback before any task begins.
    """
    known = _variables(Settings)
    for name in sorted(environ):
        if not name.startswith("INVOKE_") or name.startswith(_INVOKE_OWN_ENV):
            continue
        if name not in known:
            raise SettingRefused(
                f"{name} is no setting", f"It may be one of {', '.join(sorted(known))}; unset it or correct it."
            )
        section, key = known[name]
        if section.model_fields[key].annotation == tuple[str, ...]:
            raise SettingRefused(f"{name} is a list, which no variable can hold", "Put it in a file: inv -f FILE.yaml.")
        try:
            section.model_validate({key: environ[name]})
        except ValidationError as error:
            raise SettingRefused(
                f"{name}={environ[name]}: {error.errors()[0]['msg']}", "invoke.yaml says what it may be."
            ) from error


def _variables(section: type[BaseModel], prefix: str = "INVOKE") -> dict[str, tuple[type[BaseModel], str]]:
    found: dict[str, tuple[type[BaseModel], str]] = {}
    for name, field in section.model_fields.items():
        variable = f"{prefix}_{name.upper()}"
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= _variables(inner, variable)
        else:
            found[variable] = section, name
    return found
