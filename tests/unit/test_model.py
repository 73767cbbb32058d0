"""Which model a prompt gets that names none, and where it is sent."""

from __future__ import annotations

from typing import Any

import pytest
from lib.common.model import FREE, describe

ZEN: dict[str, Any] = {
    "id": "opencode",
    "options": {"apiKey": "public"},
    "models": {"big-pickle": {"api": {"url": "https://opencode.ai/zen/v1"}}},
}
CLAUDE: dict[str, Any] = {
    "id": "anthropic",
    "options": {"apiKey": "sk-hidden"},
    "models": {"claude": {"api": {"url": ""}}},
}
LOCAL = {"id": "ollama", "options": {"baseURL": "http://host.containers.internal:11434/v1"}}
DEFAULT = {"opencode": "big-pickle", "anthropic": "claude", "ollama": "qwen"}


@pytest.mark.parametrize(
    ("config", "providers", "text"),
    [
        ({}, [ZEN], f"opencode/big-pickle; prompts go to {FREE}"),
        ({}, [CLAUDE, ZEN], "anthropic/claude; prompts go to the API of anthropic"),
        (
            {"model": "ollama/qwen"},
            [ZEN, LOCAL],
            "ollama/qwen; prompts go to host.containers.internal",
        ),
        (
            {"provider": {"ollama": {}}},
            [ZEN, LOCAL],
            "ollama/qwen; prompts go to host.containers.internal",
        ),
        ({"model": "openai/gpt"}, [ZEN], "openai/gpt, but the provider openai has no key"),
        ({}, [], "none: add a provider's key"),
    ],
)
def test_the_model(config: dict[str, Any], providers: list[dict[str, Any]], text: str) -> None:
    answer = {"providers": providers, "default": DEFAULT}
    assert describe(config, answer) == text
