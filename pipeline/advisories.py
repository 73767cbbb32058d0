"""Known vulnerabilities of what is inside an image, and what a bump would fix, as OSV knows them.

OSV (https://osv.dev) holds the advisories of Debian, npm and PyPI alike, and is asked about all three at once.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.records import write_json
from pipeline.report import ok, table, warn
from pipeline.settings import BUILD, Settings

BATCH = 1000
"""How many packages OSV takes in one request."""

ROWS, NAMED = 20, 4
"""How many packages, and advisories of each, are said; build/advisories.json has all."""

Package = tuple[str, str, str]
"""An ecosystem as OSV calls it, a name and a version."""


@dataclass(frozen=True)
class Advisory:
    """One vulnerability of one package: ``fixed`` is the first version without it, empty where there is none yet."""

    ecosystem: str
    package: str
    version: str
    id: str
    severity: str
    summary: str
    fixed: str


def asked(inside: dict[str, Any]) -> list[Package]:
    """Return what to ask about; of Debian's packages the sources, which its advisories name."""
    found = {(f"Debian:{inside['debian']}", entry[2], entry[3]) for entry in inside["packages"]["debian"].values()}
    for kind, ecosystem in (("npm", "npm"), ("python", "PyPI")):
        rows = inside["packages"][kind].items()
        found |= {(ecosystem, name, version) for name, entry in rows for version in entry[0].split(", ")}
    return sorted(found)


def known(url: str, packages: list[Package], seconds: float) -> list[Advisory]:
    """Return the advisories that OSV at ``url`` has on these packages. Raises requests.RequestException, ValueError."""
    import requests

    with requests.Session() as session, ThreadPoolExecutor(8) as pool:

        def ask(method: str, path: str, body: object = None) -> dict[str, Any]:
            answer = session.request(method, f"{url}{path}", json=body, timeout=seconds)
            answer.raise_for_status()
            return dict(answer.json())

        hits: set[tuple[Package, str]] = set()
        waiting = [(package, "") for package in packages]
        while waiting:
            now, waiting = waiting[:BATCH], waiting[BATCH:]
            answers = ask("POST", "/v1/querybatch", {"queries": [_query(*each) for each in now]})["results"]
            for (package, _), answer in zip(now, answers, strict=True):
                hits |= {(package, each["id"]) for each in answer.get("vulns", [])}
                waiting += [(package, answer["next_page_token"])] if "next_page_token" in answer else []
        ids = sorted({each for _, each in hits})
        told = dict(zip(ids, pool.map(lambda each: ask("GET", f"/v1/vulns/{each}"), ids), strict=True))
    return [_advisory(package, told[each]) for package, each in sorted(hits) if "withdrawn" not in told[each]]


def _query(package: Package, token: str) -> dict[str, Any]:
    ecosystem, name, version = package
    query = {"package": {"ecosystem": ecosystem, "name": name}, "version": version}
    return query | ({"page_token": token} if token else {})


def _advisory(package: Package, told: dict[str, Any]) -> Advisory:
    ecosystem, name, version = package
    mine = [each for each in told.get("affected", []) if _same(each.get("package", {}), ecosystem, name)]
    events = [
        event for each in mine for span in each.get("ranges", []) if span["type"] != "GIT" for event in span["events"]
    ]
    # Each line of releases has a fix of its own: the next one above ours is that of our line.
    fixes = [event["fixed"] for event in events if _order(event.get("fixed", "0")) > _order(version)]
    severity = str(told.get("database_specific", {}).get("severity", "")).lower()
    summary = told.get("summary") or told.get("details", "").split("\n")[0]
    return Advisory(ecosystem, name, version, told["id"], severity, summary[:200], min(fixes, key=_order, default=""))


def _same(package: dict[str, str], ecosystem: str, name: str) -> bool:
    plain = [re.sub(r"[-_.]+", "-", each).lower() for each in (package.get("name", ""), name)]
    return package.get("ecosystem") == ecosystem and plain[0] == plain[1]


def _order(version: str) -> list[tuple[int, str]]:
    """Return a key that orders the versions of one package well enough to choose among its fixes."""
    epoch, _, rest = version.rpartition(":")
    parts = re.findall(r"\d+|[a-z~]+", rest.lower())
    return [(int(epoch or 0), ""), *((int(part), "") if part.isdigit() else (-1, part) for part in parts)]


def report(settings: Settings, inside: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Say what is known against what is ``inside``, and write it to ``build/``; None where nobody answers."""
    import requests

    service = settings.advisories
    if not service.url:
        return None
    packages = asked(inside)
    try:
        found = known(service.url.rstrip("/"), packages, service.seconds)
    except (requests.RequestException, ValueError, KeyError, TypeError, AttributeError) as error:
        warn(f"advisories: {service.url} gave no answer ({type(error).__name__}): what is known against these "
             "packages is unknown here. advisories.url names another service that speaks as OSV does.")  # fmt: skip
        (BUILD / "advisories.json").unlink(missing_ok=True)  # an older answer is about another image
        return None
    rows = [asdict(each) for each in found]
    write_json(BUILD / "advisories.json", rows)
    fixable: dict[Package, list[Advisory]] = {}
    for each in found:
        if each.fixed:
            fixable.setdefault((each.ecosystem, each.package, each.version), []).append(each)
    ok(f"{len(found)} advisories on {len(packages)} packages; a bump would fix {sum(map(len, fixable.values()))}")
    table("", ("package", "is", "a bump to", "fixes"), [_bump(*item) for item in list(fixable.items())[:ROWS]])
    return rows


def _bump(package: Package, found: list[Advisory]) -> tuple[str, ...]:
    what = [f"{each.id} {each.severity}".strip() for each in found]
    more = f" and {len(what) - NAMED} more" if len(what) > NAMED else ""
    to = max((each.fixed for each in found), key=_order)
    return f"{package[0]} {package[1]}", package[2], to, ", ".join(what[:NAMED]) + more
