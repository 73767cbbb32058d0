"""The model of a prompt that names none, and where OpenCode then sends it."""

from typing import Any
from urllib.parse import urlsplit

FREE = "OpenCode's own hosted free models, because no key is set"


def describe(config: dict[str, Any], answer: dict[str, Any]) -> str:
    """Return PROVIDER/MODEL and where prompts go.

    ``config`` and ``answer`` are what /config and /config/providers return.
    """
    providers = {provider["id"]: provider for provider in answer["providers"]}
    chosen = str(config.get("model") or "")
    if not chosen:
        # OpenCode takes the first provider; if the configuration has some, the first of these.
        ours = [name for name in providers if name in (config.get("provider") or providers)]
        if not ours:
            return "none: add a provider's key"
        chosen = f"{ours[0]}/{answer['default'].get(ours[0], '')}"
    name, _, model = chosen.partition("/")
    if name not in providers:
        return f"{chosen}, but the provider {name} has no key"
    return f"{chosen}; prompts go to {_place(providers[name], model)}"


def _place(provider: dict[str, Any], model: str) -> str:
    options = provider.get("options") or {}
    if options.get("apiKey") == "public":
        return FREE
    api = (provider.get("models") or {}).get(model, {}).get("api") or {}
    host = urlsplit(str(options.get("baseURL") or api.get("url") or "")).hostname
    return host or f"the API of {provider['id']}"
