"""Images to and from a registry, by digest: what is pulled is what was pushed, whatever its tags say by then."""

from __future__ import annotations

import re
import subprocess
from typing import Any

from pipeline import process
from pipeline.engine import Engine
from pipeline.errors import NoSuchRelease, NotPinned, PipelineError, RegistryRefused, RegistryUnreachable
from pipeline.report import ok, say
from pipeline.settings import Settings

KINDS = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in (
        "oci.image.index.v1", "docker.distribution.manifest.list.v2",
        "oci.image.manifest.v1", "docker.distribution.manifest.v2",
    )
)  # fmt: skip

TRANSFER_SECONDS = 1800
"""How long one push or pull of a whole image may take before it is tried anew."""


def digest_of(repository: str, tag: str, *, seconds: float = 10) -> str:
    """Return the digest that ``repository:tag`` has now, asked without credentials. Raises requests' OSErrors."""
    import requests

    host, _, path = repository.partition("/")
    scheme = "http" if host.startswith(("127.0.0.1:", "localhost:")) else "https"
    url, headers = f"{scheme}://{host}/v2/{path}/manifests/{tag}", {"Accept": KINDS}
    with requests.Session() as session:
        answer = session.head(url, headers=headers, timeout=seconds)
        if answer.status_code == requests.codes.unauthorized:  # public images too need a token, which anyone is given
            asked = dict(re.findall(r'(\w+)="([^"]*)"', answer.headers.get("WWW-Authenticate", "")))
            token = session.get(asked.pop("realm", url), params=asked, timeout=seconds).json().get("token", "")
            answer = session.head(url, headers={**headers, "Authorization": f"Bearer {token}"}, timeout=seconds)
        answer.raise_for_status()
        return answer.headers["Docker-Content-Digest"]


def push(settings: Settings, engine: Engine, to: str, name: str = "latest", *, dry_run: bool = False) -> str:
    """Push the image that is tagged ``name`` here to the repository ``to``, under its immutable tag.

    Return the name that pins it there. Raises NoSuchRelease, RegistryRefused, RegistryUnreachable.
    """
    from pipeline import history, release

    image = release.find(settings, engine, name)
    tag = release.dated_tag(settings, engine, image)
    target = f"{to}:{tag}"
    if dry_run:
        say(f"push: would push {release.short(image)} to {target}")
        return ""
    engine.tag(image["Id"], target)
    try:
        done = _patiently(settings, engine, engine.push(target))
    finally:
        engine.ask(engine.argv("rmi", target))
    found = re.findall(r"sha256:[0-9a-f]{64}", done.stdout)
    if not found:
        raise RegistryRefused(
            f"{engine.name} does not say under which digest {target} is there", "Push again.", done.said
        )
    pinned = f"{to}@{found[-1]}"
    ok(f"pushed {target}; elsewhere: inv pull --image {pinned} promote")
    history.append({"kind": "push", "image": image["Id"], "to": pinned, "tag": tag})
    return pinned


def pull(settings: Settings, engine: Engine, pinned: str, *, dry_run: bool = False) -> dict[str, Any]:
    """Pull ``pinned`` (REPOSITORY@sha256:…) and tag it ``candidate``; return what the engine says of it.

    Raises NotPinned, RegistryRefused, RegistryUnreachable.
    """
    from pipeline import release

    if not re.search(r"@sha256:[0-9a-f]{64}$", pinned):
        raise NotPinned(f"{pinned} can come to mean another image", "Name it as REPOSITORY@sha256:…, as inv push says.")
    if dry_run:
        say(f"pull: would pull {pinned} and tag it {settings.image}:candidate")
        return {}
    _patiently(settings, engine, engine.pull(pinned))
    image = engine.image(pinned)
    if image is None:
        raise NoSuchRelease(f"{engine.name} has pulled {pinned} and does not have it", "Pull it again.")
    engine.tag(image["Id"], f"{settings.image}:candidate")
    ok(f"{settings.image}:candidate is now {release.short(image)}, of {pinned}")
    return image


def _patiently(settings: Settings, engine: Engine, argv: list[str]) -> process.Completed:
    import stamina

    @stamina.retry(
        on=RegistryUnreachable, attempts=settings.network.attempts, timeout=None, wait_initial=0.5, wait_jitter=0.2
    )
    def once() -> process.Completed:
        try:
            done = engine.ask(argv, timeout=TRANSFER_SECONDS)
        except subprocess.TimeoutExpired as late:
            raise RegistryUnreachable(f"{argv[-1]}: not there after {late.timeout:g} s", "Try again later.") from late
        if done.ok:
            return done
        raise _failure(argv[-1], done)

    return once()


def _failure(name: str, done: process.Completed) -> PipelineError:
    host = name.removeprefix("docker://").partition("/")[0]
    last = done.said.splitlines()[-1] if done.said else f"exit code {done.code}"
    if re.search(r"unauthorized|authentication required|denied|no basic auth|username", done.said, re.IGNORECASE):
        return RegistryRefused(f"{host} wants a password: {last}", f"Sign the engine in first: login {host}.")
    if re.search(r"manifest unknown|name unknown|not found", done.said, re.IGNORECASE):
        return RegistryRefused(f"{host} does not have it: {last}", "Compare the digest with what inv push said.")
    return RegistryUnreachable(f"{host}: {last}", "Try again later; inv doctor says who answers.", done.said)
