"""``up``, ``down``, ``logs`` and ``shell``: the stack's life on this machine."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline import process
from pipeline.container import Server, wait_ready
from pipeline.engine import Engine
from pipeline.errors import (
    DatabaseImageMissing,
    EngineBroken,
    NoStack,
    NoSuchRelease,
    PartDown,
    PortTaken,
    ServerSilent,
    StackBusy,
    VolumesKept,
)  # fmt: skip
from pipeline.report import ok, say, warn
from pipeline.settings import Settings
from pipeline.stack import databases, runner, secrets
from pipeline.stack.manifests import PARTS, Manifests, Stack
from pipeline.stack.runner import Runner

LOCK_SECONDS = 2
DAMAGED = ("Bad file format reading the append only file", "Wrong signature", "Unexpected end of file reading")
FULL = ("No space left on device", "MISCONF")


def image_tag(settings: Settings) -> str:
    """Return the name of the image that this stack runs: a newer ``latest`` changes nothing until ``upgrade``."""
    return f"{settings.image}:stack-{settings.stack.name}"


def of(settings: Settings, engine: Engine, others: Mapping[str, str] | None = None) -> Runner:
    """Return what runs the stack, with the images of the ``others`` or those that are here. Raises SecretsRefused."""
    manifests, home = Manifests.read(), secrets.home(settings)
    known = secrets.read(home)
    ours = engine.local(image_tag(settings))
    if others is None:
        others = {part: databases.here(settings, engine, manifests, part) for part in _others(known)}
    images = {"opencode": ours, "backup": ours} | dict(others)
    agent = bool(images.get("datadog"))
    where = settings.stack
    stack = Stack(where.name, where.address, where.port, images, known, agent=agent, bounded=engine.bounded)
    return runner.of(engine, manifests, stack, home)


def _others(known: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return the parts that run other images than ours; the Agent is one with a key only."""
    return [part for part in databases.CHOSEN if part != "datadog" or known["opencode-datadog"].get("DD_API_KEY")]


@contextlib.contextmanager
def alone(settings: Settings) -> Iterator[Path]:
    """Be the only one who changes this stack; yield the directory of its secrets. Raises StackBusy."""
    home = secrets.home(settings)
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock(home / "lock", timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        raise StackBusy(
            f"the stack {settings.stack.name} is being started, ended or upgraded", "Wait for it, then inv status."
        ) from None
    with lock:
        yield home


def server(run: Runner, settings: Settings) -> Server:
    """Return the stack's server, as a client on this machine sees it."""
    password = run.stack.secrets["opencode-server"].get("OPENCODE_SERVER_PASSWORD", "")
    # A server that listens on every address is asked on loopback.
    address = "127.0.0.1" if run.stack.address == "0.0.0.0" else run.stack.address  # noqa: S104
    user = run.stack.secrets["opencode-server"].get("OPENCODE_SERVER_USERNAME", "opencode")
    return Server(f"http://{address}:{run.stack.port}", password, settings.smoke.request_seconds, user=user)


def up(settings: Settings, engine: Engine, *, dry_run: bool = False) -> None:
    """Start what is not running of the stack, wait until each part answers, and say how to connect.

    Raises NoSuchRelease, SecretsRefused, StackBusy, PortTaken, PartDown, DatabaseImageMissing, ComposeMissing.
    """
    _released(settings, engine)
    if dry_run:
        _would(settings, engine)
        return
    with alone(settings) as home:
        for name in secrets.ensure(home):
            say(f"{home / name} is written, and yours alone to read")
        run = _with_images(settings, engine)
        states = {part: run.state(part) for part in run.stack.parts}
        missing = [part for part, state in states.items() if not state.running]
        if "opencode" in missing:
            run.end("opencode")  # half of it may be there, of a start that was killed, and hold the port
            _check_port(run)
        began = time.monotonic()
        for part, state in states.items():
            started = time.monotonic()
            if part in missing:
                run.start(part)
            wait(run, settings, part, 0 if part in missing else state.restarts)
            if part in missing:
                ok(f"{part:9} {time.monotonic() - started:5.1f} s")
        if not missing:
            ok(f"all {len(states)} parts were up already, and answer")
        else:
            say(f"up in {time.monotonic() - began:.1f} s")
        if "backup" in missing and not run.backup("status").ok:
            run.backup("run", "--create", detach=True)
        _connect(run, settings, home)
        _say_if_newer(settings, engine)


def _released(settings: Settings, engine: Engine) -> None:
    """See to it that the stack has an image: the one that it had, or what is released now. Raises NoSuchRelease."""
    if engine.image(engine.local(image_tag(settings))):
        return
    latest = engine.image(engine.local(f"{settings.image}:latest"))
    if latest is None:
        raise NoSuchRelease(
            f"{engine.name} has no {settings.image}:latest", "inv fetch build smoke makes one; inv pull brings one."
        )


def _would(settings: Settings, engine: Engine) -> None:
    manifests, home = Manifests.read(), secrets.home(settings)
    known = secrets.read(home)
    others = _others(known)
    for part in PARTS:
        if part in databases.CHOSEN and part not in others:
            continue
        image = image_tag(settings)
        if part in databases.CHOSEN:
            image = databases.here(settings, engine, manifests, part) or (
                f"{databases.wanted(settings, manifests, part)}, which is to be pulled or made"
            )
        say(f"up: would start {part} from {image}")
    said = "with the secrets in" if known["opencode-server"] else "with new secrets in"
    say(f"up: on {settings.stack.address}:{settings.stack.port}, {said} {home}")


def _with_images(settings: Settings, engine: Engine) -> Runner:
    """Return what runs the stack, once each part has its image. Raises DatabaseImageMissing."""
    manifests, home = Manifests.read(), secrets.home(settings)
    latest = engine.local(f"{settings.image}:latest")
    if not engine.image(engine.local(image_tag(settings))):
        engine.tag(latest, image_tag(settings))
    tools = engine.local(image_tag(settings))
    images: dict[str, str] = {}
    for part in _others(secrets.read(home)):
        try:
            images[part] = databases.ensure(settings, engine, manifests, part, tools)
        except DatabaseImageMissing as error:
            if part != "datadog":
                raise
            warn(f"no Datadog Agent: {error.what}\n{error.details[:200]}")
    if engine.local(databases.made_tag()) in images.values():
        engine.tag(databases.made_tag(), databases.used_tag(settings))
    return of(settings, engine, images)


def _check_port(run: Runner) -> None:
    """Ask for the port before anything is started. Raises PortTaken."""
    with socket.socket() as asked:
        asked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            asked.bind((run.stack.address, run.stack.port))
        except OSError as error:
            where = f"{run.stack.address}:{run.stack.port}"
            raise PortTaken(f"{where}: {error.strerror}", "Free it, or set stack.port to another.") from None


def wait(run: Runner, settings: Settings, part: str, restarts: int = 0) -> None:
    """Wait until a part answers, which the engine has started again so often before. Raises PartDown."""
    deadline = time.monotonic() + settings.stack.ready_seconds
    if part == "opencode":
        try:
            wait_ready(server(run, settings), deadline, alive=lambda: _check_alive(run, part, restarts))
        except ServerSilent as error:
            raise down(run, part, error.what) from None
        return
    probe = run.manifests.probe(part)
    while True:
        _check_alive(run, part, restarts)
        with contextlib.suppress(subprocess.TimeoutExpired):
            if not probe or run.exec(part, *probe).ok:
                return
        if time.monotonic() > deadline:
            raise down(run, part, f"it did not answer within {settings.stack.ready_seconds:g} s")
        time.sleep(0.2)


def _check_alive(run: Runner, part: str, restarts: int) -> None:
    state = run.state(part)
    if not state.running or state.restarts > restarts:
        ended = f"it ended with exit code {state.code}" if not state.running else "it ends again and again"
        raise down(run, part, ended)


def down(run: Runner, part: str, what: str) -> PartDown:
    """Return what it means that a part is down, with its own last words."""
    log = run.logs(part)
    if any(words in log for words in FULL):
        return PartDown(f"{part}: {what}: its volume is full", "Make room for the volume; docs/operations.md.", log)
    if any(words in log for words in DAMAGED):
        remedy = "docs/operations.md has how to mend or to restore it; inv down leaves its volume as it is."
        return PartDown(f"{part}: {what}: what it has on disk is damaged", remedy, log)
    return PartDown(f"{part}: {what}", "Its log is above; inv logs --part says more.", log)


def _connect(run: Runner, settings: Settings, home: Path) -> None:
    url = server(run, settings).url
    if run.note.exists():
        warn("an upgrade was interrupted: inv upgrade finishes it, or puts image and data back")
    say(f"The server is at {url}, for user opencode with the password in {home / secrets.SERVER}:")
    say(f"  (. {home / secrets.SERVER}; export OPENCODE_SERVER_PASSWORD; opencode attach {url})")


def _say_if_newer(settings: Settings, engine: Engine) -> None:
    used, latest = (engine.image(engine.local(name)) for name in (image_tag(settings), f"{settings.image}:latest"))
    if used and latest and used["Id"] != latest["Id"] and used["Created"] < latest["Created"]:
        say("A newer image is released: inv upgrade moves to it, with a backup before.")


def end(settings: Settings, engine: Engine, *, volumes: bool = False, yes: bool = False, dry_run: bool = False) -> None:
    """End the stack. Its volumes stay, unless they are to go and somebody says yes. Raises VolumesKept, StackBusy."""
    run = of(settings, engine)
    if volumes and not yes and not dry_run:
        there = ", ".join(run.volumes()) or "none"
        raise VolumesKept(
            f"the volumes of {settings.stack.name} hold all its sessions, work, memory and local backups: {there}",
            "inv down --volumes --yes removes them for good; the secrets stay either way.",
        )
    up_now = ", ".join(part for part in PARTS if run.state(part).there)
    if dry_run:
        say(f"down: would end {up_now or 'nothing'}")
        if volumes:
            say(f"down: would remove {', '.join(run.volumes()) or 'no volume'}")
        return
    with alone(settings):
        if up_now or run.volumes():
            run.end_all()
        if left := [part for part in PARTS if run.state(part).there]:
            raise EngineBroken(
                f"{engine.name} does not end {', '.join(left)}", "inv doctor says more; then inv down again."
            )
        ok(f"ended: {up_now or 'nothing was up'}")
        if volumes:
            gone = run.volumes()
            run.remove_volumes()
            # There is nothing left to go back to, nor a reason not to begin with the newest image.
            run.note.unlink(missing_ok=True)
            for tag in (image_tag(settings), databases.used_tag(settings)):
                engine.ask(engine.argv("rmi", engine.local(tag)))
            ok(f"removed: {', '.join(gone) or 'no volume was there'}")
        elif kept := run.volumes():
            say(f"The volumes stay: {', '.join(kept)}")


def part_of(run: Runner, part: str, *, running: bool = True) -> str:
    """Return the container of a part that is there. Raises NoStack."""
    if part not in run.stack.parts:
        raise NoStack(f"the stack has no part {part}", f"There are {', '.join(run.stack.parts)}.")
    state = run.state(part)
    if not state.there or (running and not state.running):
        raise NoStack(f"{part} is not {'up' if running else 'there'}", "inv up starts the stack.")
    return run.container(part)


def logs(settings: Settings, engine: Engine, part: str = "", *, follow: bool = False, lines: int = 50) -> None:
    """Print the last lines of a part's log, or of all parts'; ``follow`` one as long as it writes. Raises NoStack."""
    run = of(settings, engine)
    words = ["logs", "--tail", str(lines)]
    if follow:
        words.append("--follow")
    for name in [part or "opencode"] if part or follow else run.stack.parts:
        container = part_of(run, name, running=False)
        if not part and not follow:
            say(f"--- {name}")
        sys.stdout.flush()
        process.run(engine.argv(*words, container), env=engine.env, terminal=True)


def shell(settings: Settings, engine: Engine, part: str = "opencode") -> None:
    """Open a shell in a part, as the user that its work is done as. Raises NoStack, EngineBroken."""
    container = part_of(of(settings, engine), part)
    # What the backup restores is to belong to the server's user: cron alone needs root.
    who = ["--user", runner.JOB_USER] if part == "backup" else []
    words = ["exec", "--interactive", *(["--tty"] if sys.stdin.isatty() else []), *who, container, "bash"]
    done = process.run(engine.argv(*words), env=engine.env, terminal=True)
    if done.code == 125:  # noqa: PLR2004 -- the engine's own; any other is of what was done in the shell
        raise EngineBroken(f"{engine.name} cannot open a shell in {part}", "inv status says how it is.", done.said)
