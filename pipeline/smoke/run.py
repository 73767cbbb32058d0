"""Run the smoke test: start an image, run every probe, and write the report.

The report is ``build/smoke.json``. No tag is moved here.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.core import process
from pipeline.core.clock import now
from pipeline.core.console import (
    fail,
    log,
    megabytes,
    ok,
    without_credentials,
)
from pipeline.core.errors import NoSuchImage, SmokeFailed
from pipeline.core.settings import BUILD, Settings
from pipeline.core.state import write_json
from pipeline.engines.container import (
    SECRET,
    Server,
    remove_leftovers,
    running,
    wait_ready,
)
from pipeline.engines.engine import Engine
from pipeline.image import tags
from pipeline.image.tags import Inspection
from pipeline.smoke import conversation, image_probes, server_probes
from pipeline.smoke.image_probes import ImageSubject
from pipeline.smoke.probe import Probe, was_late
from pipeline.smoke.server_probes import ServerSubject

THREADS = 16

ABORT_SECONDS = 5.0
"""How long commands in a container may take to end after it was removed."""

Report = dict[str, Any]

Start = Callable[..., Future[Any]]
"""Runs a function with its arguments in another thread."""


@dataclass(frozen=True)
class Result:
    """The outcome of one probe."""

    name: str
    passed: bool
    seconds: float
    detail: str


def smoke(
    settings: Settings,
    engine: Engine,
    reference: str = "",
    *,
    deep: bool = False,
    dry_run: bool = False,
) -> Report:
    """Test the candidate or the image ``reference``; return the report, also written to ``build/``.

    ``deep`` adds a conversation with a fake model. With ``dry_run`` nothing is started, and the
    report has only the image's ID.
    Raises NoSuchImage, ServerDied, ServerSilent, PortTaken, SmokeFailed.
    """
    name = reference or engine.local(f"{settings.image}:candidate")
    image = engine.image(name)
    if image is None:
        raise NoSuchImage(f"{engine.name} has no image {name}", "Build it: inv fetch build")
    if dry_run:
        log(f"smoke: would test {name} {tags.short_id(image)}")
        return {"image": image["Id"]}
    removed = remove_leftovers(engine)
    if removed:
        log(f"smoke: removed {removed} containers of killed smoke tests")
    log(f"smoke: {name} {tags.short_id(image)}, {megabytes(image['Size'])}, with {engine.name}")
    began = time.monotonic()
    results = probe_image(settings, engine, image, deep=deep)
    seconds = time.monotonic() - began
    return _report(results, seconds, target=name, image=image["Id"])


def smoke_url(
    settings: Settings,
    url: str,
) -> Report:
    """Run the HTTP probes against a running server; its password is in the environment.

    Raises ServerSilent, SmokeFailed.
    """
    url = url if "://" in url else f"http://{url}"
    password = os.environ.get(SECRET, "")
    server = Server(url.rstrip("/"), password, settings.smoke.request_seconds)
    began = time.monotonic()
    wait_ready(server, began + settings.smoke.ready_seconds)
    results = [_ready(time.monotonic() - began)]
    subject = ServerSubject(server)
    results += [run_probe(probe, subject) for probe in server_probes.PROBES]
    return _report(results, time.monotonic() - began, target=without_credentials(url))


def probe_image(
    settings: Settings,
    engine: Engine,
    image: Inspection,
    *,
    deep: bool = False,
) -> list[Result]:
    """Start an image, with and without a network, and run every probe; return the results.

    Probes of the image run while its server starts. The container without a network starts at once,
    or in a deep test at the end: two servers that start keep two cores busy.
    """
    patience = settings.smoke

    def probe_offline() -> list[Result]:
        with running(engine, image["Id"], network="none") as container:
            subject = ImageSubject(settings, image, container)
            return [run_probe(probe, subject) for probe in image_probes.OFFLINE]

    with _background(engine) as start:
        offline = [] if deep else [start(probe_offline)]
        with running(
            engine,
            image["Id"],
            port=patience.port,
            password=secrets.token_urlsafe(24),
            env=conversation.environment() if deep else (),
            timeout=patience.request_seconds,
        ) as container:
            subject = ImageSubject(settings, image, container)
            inventory = start(server_probes.read_inventory, container).result
            others = [start(run_probe, probe, subject) for probe in image_probes.STARTING]
            if deep:
                conversation.start_upstreams(container)
            container.wait_ready(patience.ready_seconds)
            results = [_ready(container.ready_seconds)]
            server = ServerSubject(container.server, inventory, image.get("Architecture", ""))
            others += [start(run_probe, probe, server) for probe in server_probes.PROBES]
            others += [start(run_probe, probe, subject) for probe in image_probes.READY]
            if deep:
                # In this thread, because Ctrl-C interrupts only this one.
                session = conversation.Session(container, inventory, patience.ready_seconds)
                results += [run_probe(probe, session) for probe in conversation.PROBES]
                wait(others)
                offline.append(start(probe_offline))
                results.append(run_probe(conversation.RESTART, session))
            results += [other.result() for other in others]
            results += offline[0].result()
            if not all(result.passed for result in results):
                log(container.logs())
    return results


@contextmanager
def _background(engine: Engine) -> Iterator[Start]:
    """Yield a function that runs another in a thread. If the block fails, end all of them first."""
    calls: list[Future[Any]] = []

    def start(*call: Any) -> Future[Any]:
        with process.deferred():
            calls.append(pool.submit(*call))
        return calls[-1]

    with ThreadPoolExecutor(THREADS) as pool:
        try:
            yield start
        except BaseException:
            # A command in a container ends with the container, but podman exec sometimes hangs.
            deadline = time.monotonic() + ABORT_SECONDS
            remove_leftovers(engine, whose=os.getpid())
            while wait(calls, timeout=0.3).not_done:
                remove_leftovers(engine, whose=os.getpid())
                if time.monotonic() > deadline:
                    process.kill_all()
            raise


def run_probe(
    probe: Probe,
    subject: object,
) -> Result:
    """Run a probe, once more if it was late, and print its result."""
    began = time.monotonic()
    detail, error = _attempt(probe, subject)
    if error and was_late(error):
        late = detail
        detail, error = _attempt(probe, subject)
        detail += f" (second attempt; the first was late: {late})"
    return _show(Result(probe.name, error is None, time.monotonic() - began, detail))


def _attempt(probe: Probe, subject: object) -> tuple[str, Exception | None]:
    """Return the detail of a probe, and why it failed.

    Any exception is a failure of this probe alone: the others must run.
    """
    try:
        return probe.check(subject), None
    except Exception as error:  # noqa: BLE001 -- see above
        # ProbeFailed and PipelineError have a message for people.
        return getattr(error, "message", "") or f"{type(error).__name__}: {error}", error


def _ready(seconds: float) -> Result:
    return _show(Result("ready", passed=True, seconds=seconds, detail="/config returns 200"))


def _show(result: Result) -> Result:
    """Print a result in one line, and return it."""
    show = ok if result.passed else fail
    show(f"{result.name:14} {result.seconds:5.2f} s  {result.detail}")
    return result


def _report(
    results: Sequence[Result],
    seconds: float,
    **subject: str,
) -> Report:
    """Write the report, print a summary, and return the report. Raises SmokeFailed."""
    failed = [result.name for result in results if not result.passed]
    report = {
        **subject,
        "finished": now(),
        "seconds": round(seconds, 2),
        "ready_seconds": round(results[0].seconds, 2),
        "passed": not failed,
        "probes": [asdict(result) for result in results],
    }
    write_json(BUILD / "smoke.json", report)
    passed = f"{len(results) - len(failed)} of {len(results)} probes passed"
    log(f"smoke: {passed} in {seconds:.1f} s; report: build/smoke.json")
    if failed:
        raise SmokeFailed(
            f"{len(failed)} of {len(results)} probes failed: {', '.join(failed)}",
            "See the FAIL lines above. No tag was moved.",
        )
    return report
