"""``up``, ``down``, ``logs``, ``shell``, ``attach`` and ``login``."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator

from filelock import FileLock, Timeout

from pipeline.core.console import log, ok
from pipeline.core.errors import (
    LoginFailed,
    NoStack,
    NoSuchRelease,
    PartDown,
    StackBusy,
    VolumesKept,
)
from pipeline.core.settings import Settings
from pipeline.engines.container import PORT
from pipeline.engines.engine import Engine
from pipeline.stack import databases, gateway, git, secrets, workspace
from pipeline.stack.compose import PARTS, Project, image_tag, other_parts, project_of
from pipeline.stack.workspace import VOLUME

LOCK_SECONDS = 2

PROBES = {
    "falkordb": "REDISCLI_AUTH=$FALKORDB_PASSWORD redis-cli -p 6379 ping | grep -q PONG",
    "valkey": "REDISCLI_AUTH=$VALKEY_PASSWORD valkey-cli -p 6380 ping | grep -q PONG",
    "opencode": "/app/scripts/health",
}
"""Commands that succeed once a part is ready: the startup probes of deploy/kubernetes."""

PROBE_SECONDS = 3
"""A request that arrives while OpenCode opens its socket is never answered: try again early."""

DETACH = "ctrl-@,ctrl-@,ctrl-@"
"""The engines' default begins with Ctrl-P, which opens OpenCode's list of commands."""

LOG_CAUSES = {
    "No space left on device": "its volume is full",
    "MISCONF": "its volume is full",
    "Bad file format reading the append only file": "its file on disk is damaged",
    "Wrong signature": "its file on disk is damaged",
    "Unexpected end of file reading": "its file on disk is damaged",
}
"""What the databases log, and what it means."""


DENIED = ("permission denied for UID", "PermissionDenied", "EACCES")
"""What the server logs where the state belongs to another user."""


@contextlib.contextmanager
def exclusive(settings: Settings) -> Iterator[None]:
    """Hold the stack's lock. Raises StackBusy."""
    home = secrets.home(settings)
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with FileLock(home / "lock", timeout=LOCK_SECONDS):
            yield
    except Timeout:
        raise StackBusy(
            f"another command is changing the stack {settings.stack.name}",
            "Wait until it has finished: inv status.",
        ) from None


def up(
    settings: Settings,
    engine: Engine,
    *,
    project_directory: str = "",
    clone: str = "",
    dry_run: bool = False,
) -> None:
    """Start what is not running or has other settings, and print how to connect.

    ``project_directory`` is mounted at /workspace; the URL ``clone`` is cloned into the volume.
    Raises NoSuchRelease, SecretsRefused, ProjectRefused, StackBusy, PortTaken, PartDown,
    DatabaseImageMissing, ComposeMissing.
    """
    tag = engine.local(image_tag(settings))
    if not engine.image(tag):
        tag = engine.local(f"{settings.image}:latest")
    if not engine.image(tag):
        raise NoSuchRelease(
            f"{engine.name} has no image {tag}",
            "Build one: inv fetch build smoke. Or pull one: inv pull.",
        )
    if dry_run:
        project = project_of(settings, engine)
        log(f"up: would start {', '.join(project.parts)} from {tag}")
        log(f"up: on {project.address}, with the secrets in {project.home}")
        return
    with exclusive(settings):
        for name in secrets.ensure(secrets.home(settings)):
            log(f"wrote {secrets.home(settings) / name}")
        workspace.choose(settings, secrets.home(settings), VOLUME if clone else project_directory)
        engine.tag(tag, image_tag(settings))
        for part in other_parts(settings, secrets.read(secrets.home(settings))):
            databases.ensure(settings, engine, part, tag)
        project = project_of(settings, engine)
        _start_missing(project)
        server = project.container("opencode")
        git.identify(engine, server)
        if clone and git.clone(engine, server, clone):
            ok(f"cloned {clone}")
            # The server reads the project when it starts.
            engine.must("restart", server)
            wait_server(project)
        _print_address(project)


def _start_missing(project: Project) -> None:
    """Start what is not running and wait for all parts; make the first backup in the background."""
    states = {part: project.state(part) for part in project.parts}
    changed = [part for part, state in states.items() if project.changed(part, state)]
    missing = [part for part in project.parts if part in changed or not states[part].running]
    if not states["gateway"].exists:
        # Containers of an earlier release have the port and other passwords.
        missing = project.parts
    began = time.monotonic()
    if missing:
        project.start(*missing)
    else:
        ok(f"all {len(states)} parts are already running")
    for part in project.parts:
        wait(project, part, 0 if part in missing else states[part].restarts)
        if part in missing:
            ok(f"{part:9} ready after {time.monotonic() - began:.1f} s")
    if "backup" in missing and not project.backup("status").ok:
        command = ["/app/scripts/backup", "run", "--create"]
        engine = project.engine
        engine.ask(engine.exec(project.container("backup"), *command, detach=True))


def wait(project: Project, part: str, restarts: int = 0) -> None:
    """Wait until a part answers; ``restarts`` is its restart count so far. Raises PartDown."""
    seconds = project.settings.stack.ready_seconds
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state = project.state(part)
        if not state.running:
            raise _part_down(project, part, f"exited with code {state.code}")
        if state.restarts > restarts:
            raise _part_down(project, part, "keeps restarting")
        with contextlib.suppress(subprocess.TimeoutExpired):
            if _answers(project, part):
                return
        time.sleep(0.1)
    raise _part_down(project, part, f"no answer within {seconds:g} s")


def wait_server(project: Project, restarts: int = 0) -> None:
    """Wait until the server answers, also through the gateway if that runs. Raises PartDown.

    A moment longer: the server's name may still stand for its former container's address.
    """
    wait(project, "opencode", restarts)
    front = project.state("gateway")
    if front.running:
        wait(project, "gateway", front.restarts)


def _answers(project: Project, part: str) -> bool:
    """Ask a part; those without a probe only have to run. Raises subprocess.TimeoutExpired."""
    if part == "gateway":
        return not project.gateway_problem()
    if part not in PROBES:
        return True
    return project.exec(part, "sh", "-c", PROBES[part], timeout=PROBE_SECONDS).ok


def _part_down(project: Project, part: str, reason: str) -> PartDown:
    """Return the error for a part that does not run, with the end of its log."""
    done = project.engine.ask(project.engine.logs(project.container(part), 15))
    output = done.stdout + done.stderr
    for words, cause in LOG_CAUSES.items():
        if words in output:
            reason = f"{reason}: {cause}"
            break
    remedy = f"See its log above, inv logs --part {part}, and docs/operations.md."
    if any(words in output for words in DENIED):
        reason = f"{reason}: its volumes belong to another user than {project.workspace.user}"
        remedy = f"Change their owner, then inv up: {shlex.join(project.chown())}"
    return PartDown(f"{part}: {reason}", remedy, output)


def _print_address(project: Project) -> None:
    path = project.home / secrets.GATEWAY
    log(f"Open {gateway.page(project.settings.stack)} in a browser, or: inv attach")
    log(f"  user {project.user}, password: GATEWAY_PASSWORD in {path}")
    log(f"  model {_model(project)}")


def _model(project: Project) -> str:
    """Return the model of prompts that name none, and where they go."""
    argv = ("/app/scripts/status", "server", "--json", "--timeout", "20")
    try:
        answer = json.loads(project.exec("opencode", *argv).stdout)
        return str(answer["parts"]["server"]["model"])
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        return "unknown: inv status"


def down(
    settings: Settings,
    engine: Engine,
    *,
    volumes: bool = False,
    yes: bool = False,
    dry_run: bool = False,
) -> None:
    """Stop the stack and remove its containers; with ``volumes`` and ``yes`` its volumes too.

    Raises VolumesKept, StackBusy, EngineBroken.
    """
    project = project_of(settings, engine)
    names = ", ".join(project.volumes()) or "none"
    if volumes and not yes and not dry_run:
        raise VolumesKept(
            f"refusing to delete volumes without --yes: {names}",
            "inv down --volumes --yes deletes all sessions, files, memories and local backups.",
        )
    existing = [part for part in PARTS if project.state(part).exists]
    listed = ", ".join(existing) or "nothing is running"
    if dry_run:
        log(f"down: would stop: {listed}; volumes to {'delete' if volumes else 'keep'}: {names}")
        return
    with exclusive(settings):
        project.remove(*existing)
        for network in ("default", "outside"):
            engine.ask(engine.remove_network(f"{project.name}_{network}"))
        ok(f"stopped: {listed}")
        if volumes:
            _delete_volumes(project)
            workspace.forget(project.home)
        log(f"volumes {'deleted' if volumes else 'kept'}: {names}")


def _delete_volumes(project: Project) -> None:
    """Delete the volumes, the upgrade record and the tags of this stack. Raises EngineBroken."""
    engine = project.engine
    if existing := project.volumes():
        engine.must("volume rm", *existing)
    project.note.unlink(missing_ok=True)
    used = {databases.used_tag(project.settings, part) for part in databases.SETTINGS}
    for tag in (image_tag(project.settings), *used):
        engine.ask(engine.remove_image(engine.local(tag)))


def logs(
    settings: Settings, engine: Engine, part: str = "", *, follow: bool = False, lines: int = 50
) -> None:
    """Print the last lines of a part's output, or of all parts. Raises NoStack.

    ``follow`` prints one part's output, the server's by default, until interrupted.
    """
    project = project_of(settings, engine)
    if follow and not part:
        part = "opencode"
    for name in [part] if part else project.parts:
        container = _container(project, name)
        if not part:
            log(f"--- {name}")
        sys.stdout.flush()
        argv = engine.logs(container, lines, follow=follow)
        engine.ask(argv, timeout=None, terminal=True)


def shell(settings: Settings, engine: Engine, part: str = "opencode") -> None:
    """Open bash in a part's container. Raises NoStack."""
    _on_terminal(project_of(settings, engine), part, "bash")


def attach(settings: Settings, engine: Engine) -> None:
    """Run OpenCode's terminal interface in the server's container. Raises NoStack."""
    url = f"http://localhost:{PORT}"
    _on_terminal(project_of(settings, engine), "opencode", "opencode", "attach", url)


def login(settings: Settings, engine: Engine) -> None:
    """Run OpenCode's log-in, whose result is in the state volume, and have the server read it.

    Raises NoStack, LoginFailed, PartDown.
    """
    project = project_of(settings, engine)
    if not _on_terminal(project, "opencode", "opencode", "auth", "login"):
        remedy = "See its output above. A key can also be in server.env: docs/operations.md."
        raise LoginFailed("opencode auth login failed or was cancelled", remedy)
    engine.must("restart", project.container("opencode"))
    wait_server(project, project.state("opencode").restarts)
    ok(f"model {_model(project)}")


def _on_terminal(project: Project, part: str, *command: str) -> bool:
    """Run a command on this terminal, and return whether it succeeded. Raises NoStack."""
    container = _container(project, part)
    argv = project.engine.exec(
        container,
        *command,
        interactive=True,
        tty=sys.stdin.isatty(),
        detach_keys=DETACH,
    )
    return project.engine.ask(argv, timeout=None, terminal=True).ok


def _container(project: Project, part: str) -> str:
    """Return the container of a part that exists. Raises NoStack."""
    if not project.state(part).exists:
        raise NoStack(f"the stack has no {part}", "Start it: inv up.")
    return project.container(part)
