"""What the tasks have in common."""

from __future__ import annotations

from typing import Any

import pytest
from invoke.config import Config
from invoke.context import Context

from pipeline.engines import detect
from pipeline.task_context import engine_of


@pytest.mark.parametrize(("flag", "name"), [("", "podman"), ("docker", "docker")])
def test_a_task_asks_for_the_engine_and_the_platform_that_are_set(
    monkeypatch: pytest.MonkeyPatch, flag: str, name: str
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(detect, "find", lambda *words: asked.append(words))
    with engine_of(
        Context(Config(overrides={"engine": "podman", "platform": "linux/arm64"})), flag
    ):
        assert asked == [(name, "linux/arm64")]
