"""Build the image: its labels, its tag, what each step took, and what changed since the last build."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import base, ca, contents, openagents, process
from pipeline.engine import Engine, look
from pipeline.errors import (
    BuildFailed,
    ConfigRefused,
    ContainerfileRefused,
    DiskFull,
    EngineLost,
    LockBroken,
    NothingFetched,
    PipelineError,
    SettingRefused,
)
from pipeline.records import read_json, write_json
from pipeline.report import console, megabytes, say, table, without_credentials
from pipeline.settings import BUILD, ROOT, Settings

SPLIT = "FROM runtime AS server"
"""Where the Containerfile's part that people edit begins."""

RUNTIME_LOCKS = ("locks/npm/*/*.json", "locks/image.txt", "locks/uv.txt")

RUNTIME = "opencode-server-runtime"

OCI = "org.opencontainers.image"
OURS = "opencode-server.openagents"
BUILD_OF, RUNTIME_OF = "opencode-server.build", "opencode-server.runtime"
"""Labels that say for which image name a build, or a runtime, was made. A build inherits the runtime's."""

NIGHTLY = "-nightly"
"""What a night's builds are called besides."""


@dataclass
class Steps:
    """What each step of a build took, read off the build's own output as it comes."""

    began: dict[str, tuple[str, float]] = field(default_factory=dict)
    commits: list[float] = field(default_factory=list)
    took: list[tuple[str, float]] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    def feed(self, line: str, now: float) -> None:
        """Take one line, seen at ``now`` seconds."""
        if step := re.match(r"(?:\[(\d+)/\d+\] )?(?:STEP|Step) \d+/\d+ ?: (.+)", line):
            stage = step[1] or ""
            if stage in self.began:
                # podman's mark of a finished step names no stage; the last one before the next step is that step's.
                # FROM has none (docker's old builder marks it too).
                if "Step " in line or not self.began[stage][0].startswith("FROM"):
                    del self.commits[-1:]
                self._close(stage, now)
            self.began[stage] = (step[2], now)
        elif re.match(r"(?:-->| --->) [0-9a-f]+$", line):  # `Using cache` and `Running in` are said besides
            self.commits.append(now)
        elif step := re.match(r"#(\d+) (\[.+)", line):  # BuildKit times its steps itself
            self.names[step[1]] = step[2]
        elif (step := re.match(r"#(\d+) DONE ([\d.]+)s", line)) and step[1] in self.names:
            self.took.append((self.names[step[1]], float(step[2])))

    def finish(self, now: float) -> list[tuple[str, float]]:
        """Return (step, seconds), longest first."""
        for stage in sorted(self.began, key=lambda stage: self.began[stage][1]):
            self._close(stage, self.commits.pop(0) if self.commits else now)
        self.began.clear()
        return sorted(self.took, key=lambda step: -step[1])

    def _close(self, stage: str, now: float) -> None:
        text, began = self.began[stage]
        self.took.append((text, now - began))


def build(settings: Settings, engine: Engine, *, cache: bool = True, dry_run: bool = False) -> dict[str, Any]:
    """Build ``opencode-server:candidate`` and return its record, which is also written to ``build/``.

    The tag moves only when every step has passed. Without ``cache`` every step is done anew: newer Debian packages
    come in. Raises ConfigRefused, NothingFetched, BaseUnavailable, BuildFailed,
    ContainerfileRefused, EngineLost, DiskFull.
    """
    check_config(ROOT / "config.json")
    fetched = openagents.read(ROOT / "vendor")
    if fetched is None:
        raise NothingFetched("vendor/OpenAgents is not there", "Fetch it first: inv fetch.")
    found = base.ensure(engine, settings, dry_run=dry_run)
    runtime = runtime_tag(ROOT, found.reference if found else "")
    tree = openagents.tree_hash(ROOT / "vendor" / openagents.NAME)
    inputs = inputs_of(ROOT, tree)
    record_file = BUILD / f"build-{engine.name}.json"
    last = read_json(record_file)
    if dry_run or found is None:
        say(f"build: would build {settings.image}:candidate with {engine.name}; {'; '.join(changes(last, inputs))}")
        return {}
    certificates = ca.stage(settings.ca)
    say(f"build: {engine.name}, {found.reference}, {fetched.kind} {fetched.commit[:12]}, {certificates} extra CAs")
    began, steps = time.monotonic(), Steps()
    owner = owner_of(settings.image)
    labelled = {BUILD_OF: owner, **labels(found, fetched, edited=tree != fetched.tree)}
    if not cache or engine.image(engine.local(runtime)) is None:
        say("build: runtime (everything that is fetched); it is built once for these locks")
        whose = {RUNTIME_OF: owner}
        _run(engine, steps, tag=runtime, base_reference=found.reference, target="runtime", labels=whose, cache=cache)
    tag = f"{settings.image}:candidate"
    _run(
        engine,
        steps,
        tag=tag,
        base_reference=found.reference,
        runtime=engine.local(runtime),
        labels=labelled,
    )
    seconds = time.monotonic() - began
    # Asked by its tag: what buildx writes as the ID is not always one that docker knows (moby/moby#45458).
    image = engine.image(engine.local(tag))
    if image is None:
        raise EngineLost(f"{engine.name} has built {tag} and does not have it", "Is a remote builder in use?")
    record = {
        "image": tag,
        "id": image["Id"].removeprefix("sha256:"),
        "engine": engine.name,
        "size": image["Size"],
        "seconds": round(seconds, 2),
        "finished": now(),
        "steps": [[text, round(took, 2)] for text, took in steps.finish(time.monotonic())],
        "changes": changes(last, inputs),
        "inputs": inputs,
    }
    write_json(record_file, record)
    contents.keep(engine, image, runtime, read_containerfile(ROOT).partition(f"\n{SPLIT}\n")[2])
    _summary(record, last)
    return record


def _run(
    engine: Engine,
    steps: Steps,
    *,
    tag: str,
    base_reference: str,
    target: str = "",
    runtime: str = "",
    labels: dict[str, str] | None = None,
    cache: bool = True,
) -> None:
    # podman leaves what a step worked with in TMPDIR when it is ended; layers pass through there, so not in memory.
    temporary = os.environ.get("TMPDIR", "/var/tmp")  # noqa: S108 -- podman's own default
    with tempfile.TemporaryDirectory(dir=temporary, ignore_cleanup_errors=True) as scratch:
        containerfile = Path(scratch) / "Containerfile"
        text = read_containerfile(ROOT)
        part = server_part(text, runtime, labels or {}) if runtime else runtime_part(text, labels or {})
        containerfile.write_text(part)
        argv = engine.build(
            ROOT,
            tag=tag,
            containerfile=containerfile,
            target=target,
            build_args={"BASE": base_reference} if target else {},
            cache=cache,
        )

        def on_line(line: str) -> None:
            steps.feed(line, time.monotonic())
            console().print(line, markup=False, style="dim")

        began = time.time()
        try:
            done = engine.follow(argv, on_line, env={"TMPDIR": scratch})
        except BaseException:
            engine.remove_working_containers(began, base_reference)
            raise
        if not done.ok:
            raise explain(done, engine)


def read_containerfile(root: Path) -> str:
    """Return the Containerfile. Raises ContainerfileRefused when it is missing, or its last stage cannot be found."""
    path = root / "Containerfile"
    text = path.read_text() if path.exists() else ""
    if f"\n{SPLIT}\n" not in text:
        raise ContainerfileRefused(
            f"the Containerfile has no line {SPLIT!r}",
            "Its last stage must begin so: a build after an edit begins there.",
        )
    return text


def server_part(text: str, runtime: str, labels: dict[str, str]) -> str:
    """Return the Containerfile's last stage, on top of the image ``runtime``, each line where it was, and ``labels``.

    Not a build argument in FROM: podman 4.3 then does not see that the stage of that name comes first. Not ``--label``:
    podman makes a step of each, and nine of them are a third of the build after an edit.
    """
    above, _, below = text.partition(f"\n{SPLIT}\n")
    return "\n" * (above.count("\n") + 1) + SPLIT.replace("runtime", runtime, 1) + "\n" + below + label_line(labels)


def runtime_part(text: str, labels: dict[str, str]) -> str:
    """Return the Containerfile with ``labels`` at the end of its last stage but one."""
    above, _, below = text.partition(f"\n{SPLIT}\n")
    return f"{above}{label_line(labels)}\n{SPLIT}\n{below}"


def label_line(labels: dict[str, str]) -> str:
    """Return the LABEL instruction that sets ``labels``, or nothing."""
    quoted = [f"{key}={json.dumps(value, ensure_ascii=False)}".replace("$", r"\$") for key, value in labels.items()]
    return f"\nLABEL {' '.join(quoted)}\n" if labels else ""


def explain(done: process.Completed, engine: Engine) -> PipelineError:
    """Return the failure that a build's output tells of, with its last lines."""
    said = done.stdout
    details = "\n".join(said.splitlines()[-25:])
    if re.search(r"no space left on device|ENOSPC|disk quota exceeded", said, re.IGNORECASE):
        return DiskFull("no space is left for the build", "inv doctor says where; a build needs about 6 GB.", details)
    # docker's old builder, and its BuildKit before buildx, say that the daemon is gone with no `error` in front.
    marks = ("error", "failed to", "unexpected eof", "cannot connect")
    errors = "\n".join(line for line in said.splitlines()[-10:] if line.lower().startswith(marks))
    unreadable = r"parse error|unknown instruction|no build stage|no FROM statement|unable to process"
    if re.search(unreadable, errors, re.IGNORECASE):
        return ContainerfileRefused(
            f"{engine.name} cannot read the Containerfile", "Correct the line it names; inv lint finds it too.", details
        )
    gone = r"error during connect|unexpected EOF|Cannot connect to the Docker daemon|transport is closing"
    if done.code < 0 or re.search(gone, errors) or look(engine.name)[0] is None:
        return EngineLost(
            f"{engine.name} went away during the build", "Start it again and repeat; no tag has moved.", details
        )
    if re.search(r"EINTEGRITY|DO NOT MATCH THE HASHES|hash mismatch", said, re.IGNORECASE):
        return LockBroken(
            "a download is not what locks/ pins", "It or the lock was tampered with: do not use it.", details
        )
    return BuildFailed(
        "a step of the Containerfile failed; its last lines are above", "Correct it and build again; no tag has moved.",
        details,
    )  # fmt: skip


def check_config(path: Path) -> None:
    """Check OpenCode's configuration against its own schema: the server drops a key it does not know without a word.

    Raises ConfigRefused.
    """
    import jsonschema

    schema = json.loads((ROOT / "locks" / "opencode-config.schema.json").read_text())
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigRefused(f"{path.name}: {error}", "It must be JSON; compare it with git diff.") from error
    faults = sorted(jsonschema.Draft202012Validator(schema).iter_errors(config), key=lambda fault: list(fault.path))
    if faults:
        lines = [f"{path.name}: {'.'.join(map(str, fault.path)) or 'top level'}: {fault.message}" for fault in faults]
        raise ConfigRefused(
            f"{path.name} is not a configuration of OpenCode", "https://opencode.ai/docs/config lists the keys.",
            "\n".join(line[:500] for line in lines),
        )  # fmt: skip


def runtime_tag(root: Path, base_reference: str) -> str:
    """Return the name of the runtime stage's image, from everything that goes into it."""
    digest = hashlib.sha256(base_reference.encode())
    digest.update(read_containerfile(root).partition(f"\n{SPLIT}\n")[0].encode())
    for path in sorted(path for pattern in RUNTIME_LOCKS for path in root.glob(pattern)):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return f"{RUNTIME}:{digest.hexdigest()[:12]}"


def owner_of(image: str) -> str:
    """Return the name by which images say whose they are: a night's builds are those of the image that it releases."""
    return image.removesuffix(NIGHTLY)


def inputs_of(root: Path, openagents_tree: str) -> dict[str, str]:
    """Return what goes into the image: each file's path to the hash of its contents, OpenAgents as one."""
    files = [root / "Containerfile", root / "config.json", *sorted((root / "scripts").rglob("*"))]
    files += sorted(path for path in (root / "locks").rglob("*") if path.suffix in {".json", ".txt"})
    hashes = {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file() and "__pycache__" not in path.parts
    }
    return {**hashes, "vendor/OpenAgents": openagents_tree}


def changes(last: dict[str, Any], inputs: dict[str, str]) -> list[str]:
    """Return what changed against the last build's record, a phrase each."""
    before = last.get("inputs")
    if not before:
        return ["the first build here"]
    changed = [f"{path} changed" for path in inputs if path in before and before[path] != inputs[path]]
    changed += [f"{path} is new" for path in inputs if path not in before]
    changed += [f"{path} is gone" for path in before if path not in inputs]
    return changed or ["nothing changed"]


def labels(found: base.Base, fetched: openagents.Record, *, edited: bool) -> dict[str, str]:
    """Return the image's labels: OCI's own, and OpenAgents' source."""
    revision, source = _git("rev-parse", "HEAD"), _git("config", "--get", "remote.origin.url")
    dirty = "-dirty" if revision and _git("status", "--porcelain") else ""
    return {
        f"{OCI}.title": "opencode-server",
        f"{OCI}.source": without_credentials(source) or "unknown",
        f"{OCI}.base.name": found.name,
        f"{OCI}.base.digest": found.digest or f"sha256:{found.image_id}",
        f"{OURS}.kind": fetched.kind,
        f"{OURS}.source": without_credentials(fetched.url),
        f"{OURS}.commit": f"{fetched.commit}-edited" if edited else fetched.commit,
        f"{OCI}.revision": f"{revision}{dirty}" if revision else "unknown",
        f"{OCI}.created": now(),
    }


def now() -> str:
    """Return the time in UTC as RFC 3339 to the second, or SOURCE_DATE_EPOCH when that is set."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    try:
        moment = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
    except (ValueError, OverflowError, OSError):
        moment = None
    if moment is None or epoch.startswith("-"):
        what = f"SOURCE_DATE_EPOCH={epoch} is no number of seconds since 1970"
        raise SettingRefused(what, "Correct it, or unset it.")
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _git(*words: str) -> str:
    if not (ROOT / ".git").exists():
        return ""  # an unpacked archive; what is above it is somebody else's
    done = process.run(["git", "-C", str(ROOT), *words])
    return done.stdout.strip() if done.ok else ""


def _summary(record: dict[str, Any], last: dict[str, Any]) -> None:
    slow = [(_brief(text), f"{took:.1f} s") for text, took in record["steps"] if took >= 0.5]  # noqa: PLR2004
    table(
        "Steps of half a second or more; stages run side by side, and a COPY waits for its own", ("step", "took"), slow
    )
    size = megabytes(record["size"])
    if "size" in last:
        size += f" ({round((record['size'] - last['size']) / 1e6, 1) + 0.0:+.1f} MB)"  # + 0.0: there is a -0.0
    say(f"built {record['image']}  {record['id'][:12]}  {size}  in {record['seconds']:.1f} s")
    say(f"since the last build: {'; '.join(record['changes'])}")


def _brief(step: str) -> str:
    return " ".join(step.replace("set -eu;", "").split())[:100]
