"""Known vulnerabilities of an image's packages, from OSV (https://osv.dev) or a service like it.

The API: https://google.github.io/osv.dev/api/
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.core.console import ok, table, warn
from pipeline.core.settings import BUILD, Settings
from pipeline.core.state import write_json

BATCH = 1000
"""Packages that OSV accepts in one request."""

ROWS = 20
"""Advisories that the table lists; build/advisories.json has all."""

SEVERITIES = ("low", "moderate", "high", "critical")
"""As GitHub's advisories name them; OSV has those of npm and PyPI from there."""

Package = tuple[str, str, str]
"""OSV's name of an ecosystem, the name of a package, its version."""

Row = dict[str, str]
"""One advisory of one package; ``fixed`` is the first version without it, or empty."""


def report(settings: Settings, inventory: dict[str, Any]) -> list[Row] | None:
    """Print known vulnerabilities of an inventory's packages, and write them to ``build/``.

    Returns None, with a warning, if the service does not answer.
    """
    import requests

    service = settings.advisories
    if not service.url:
        return None
    path = BUILD / "advisories.json"
    packages = packages_of(inventory)
    try:
        rows = find(service.url.rstrip("/"), packages, service.seconds)
    except (requests.RequestException, ValueError, LookupError, TypeError, AttributeError) as error:
        warn(
            f"advisories: no answer from {service.url} ({type(error).__name__}). "
            "Name another service with OSV's API in advisories.url."
        )
        path.unlink(missing_ok=True)  # It describes another image.
        return None
    write_json(path, rows)
    fixable = [
        (
            f"{row['ecosystem']} {row['package']}",
            row["version"],
            row["fixed"],
            f"{row['id']} {row['severity']}",
        )
        for row in rows
        if row["fixed"]
    ]
    ok(f"{len(rows)} advisories on {len(packages)} packages; newer versions fix {len(fixable)}")
    table("", ("package", "version", "fixed in", "advisory"), fixable[:ROWS])
    return rows


def blocking(severity: str, rows: list[Row]) -> list[str]:
    """Return the advisories in ``rows`` of this severity or worse: ID, package and version."""
    blocked = SEVERITIES[SEVERITIES.index(severity) :]
    found = {
        f"{row['id']} ({row['package']} {row['version']})"
        for row in rows
        if row["severity"] in blocked
    }
    return sorted(found)


def packages_of(inventory: dict[str, Any]) -> list[Package]:
    """Return the packages to query. Debian's advisories name source packages."""
    packages = inventory["packages"]
    debian = f"Debian:{inventory['debian']}"
    found = set()
    for _, _, source, version in packages["debian"].values():
        found.add((debian, source, version))
    for ecosystem, kind in (("npm", "npm"), ("PyPI", "python")):
        for name, entry in packages[kind].items():
            for version in entry[0].split(", "):
                found.add((ecosystem, name, version))
    return sorted(found)


def find(
    url: str,
    packages: list[Package],
    seconds: float,
) -> list[Row]:
    """Return the advisories of ``packages``, without withdrawn ones.

    ``seconds`` is the time limit of one request. Raises requests.RequestException, and ValueError
    or KeyError if the answer is not that of OSV.
    """
    import requests

    def ask(path: str, body: object = None) -> dict[str, Any]:
        method = "POST" if body else "GET"
        response = requests.request(method, url + path, json=body, timeout=seconds)
        response.raise_for_status()
        return dict(response.json())

    matches = []
    waiting: list[dict[str, Any]] = [
        {"package": {"ecosystem": ecosystem, "name": name}, "version": version}
        for ecosystem, name, version in packages
    ]
    while waiting:
        batch, waiting = waiting[:BATCH], waiting[BATCH:]
        answer = ask("/v1/querybatch", {"queries": batch})
        for query, result in zip(batch, answer["results"], strict=True):
            matches += [(query, advisory["id"]) for advisory in result.get("vulns", [])]
            if token := result.get("next_page_token"):
                waiting.append({**query, "page_token": token})
    # OSV lists only the IDs of a package's advisories. Each is fetched once.
    ids = sorted({identity for _, identity in matches})
    with ThreadPoolExecutor(8) as pool:
        details = dict(zip(ids, pool.map(ask, [f"/v1/vulns/{each}" for each in ids]), strict=True))
    return [
        _row(query, details[identity])
        for query, identity in matches
        if "withdrawn" not in details[identity]
    ]


def _row(query: dict[str, Any], detail: dict[str, Any]) -> Row:
    """Return what is reported of an advisory. Severity and summary may be missing."""
    specific = detail.get("database_specific", {})
    summary = detail.get("summary") or detail.get("details", "").split("\n")[0]
    return {
        "ecosystem": query["package"]["ecosystem"],
        "package": query["package"]["name"],
        "version": query["version"],
        "id": detail["id"],
        "severity": str(specific.get("severity", "")).lower(),
        "summary": summary[:200],
        "fixed": _fixed(query, detail.get("affected", [])),
    }


def _fixed(query: dict[str, Any], affected: list[dict[str, Any]]) -> str:
    """Return the lowest version above the package's that fixes it.

    Each line of releases has a fix of its own; the next one above belongs to the package's line.
    """
    fixes = [
        event.get("fixed", "")
        for entry in affected
        if _plain(entry["package"]) == _plain(query["package"])
        for span in entry.get("ranges", [])
        if span["type"] != "GIT"
        for event in span["events"]
    ]
    newer = [fix for fix in fixes if order(fix) > order(query["version"])]
    return min(newer, key=order, default="")


def _plain(package: dict[str, str]) -> tuple[str, str]:
    """Return ecosystem and name as they compare: PyPI ignores case, and - _ . are the same."""
    return package["ecosystem"], re.sub(r"[-_.]+", "-", package["name"]).lower()


def order(version: str) -> list[tuple[int, str]]:
    """Return a sort key for versions of a package, exact enough to choose among its fixes."""
    epoch, _, rest = version.rpartition(":")
    key = [(int(epoch or 0), "")]
    for part in re.findall(r"\d+|[a-z~]+", rest.lower()):
        if part.isdigit():
            key.append((int(part), ""))
        else:
            key.append((-1, part))
    return key
