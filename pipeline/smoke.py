"""Start the image, ask it everything, say what it answered, and give it its tag when all is well."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any
from xml.etree import ElementTree as ET

from pipeline import conversation, probes, process, release
from pipeline.container import SECRET, Server, remove_leftovers, running, wait_ready
from pipeline.engine import Engine
from pipeline.errors import NoSuchImage, PipelineError, SmokeFailed
from pipeline.image import now
from pipeline.records import write_json
from pipeline.report import fail, megabytes, ok, say, without_credentials
from pipeline.settings import BUILD, Settings

LEAVING_SECONDS = 5.0
"""How long what was asked of a container may take to end once the container is gone."""

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What no XML may hold, escaped or not; a log in colour does."""


@dataclass(frozen=True)
class Answer:
    """What a probe got: ``seconds`` it took, and whether it ``passed``."""

    name: str
    passed: bool
    seconds: float
    detail: str


def smoke(
    settings: Settings, engine: Engine, reference: str = "", *, deep: bool = False, dry_run: bool = False
) -> dict[str, Any]:
    """Smoke the candidate, or the image ``reference``; return the report, which is also written to ``build/``.

    ``deep`` has a whole conversation with it too.

    A candidate that passes becomes ``latest``, and what was latest becomes ``previous``. Raises NoSuchImage,
    ServerDied, ServerSilent, PortTaken, SmokeFailed.
    """
    candidate = engine.local(f"{settings.image}:candidate")
    name = reference or candidate
    image = engine.image(name)
    if image is None:
        raise NoSuchImage(f"{engine.name} has no image {name}", "Build it first: inv fetch build.")
    if dry_run:
        say(f"smoke: would start {name} {release.short(image)} twice, and ask {_count(deep=deep)} probes")
        return {}
    if gone := remove_leftovers(engine):
        say(f"smoke: removed {gone} containers of smoke tests that were killed")
    say(f"smoke: {name} {release.short(image)}, {megabytes(image['Size'])}, with {engine.name}")
    began = time.monotonic()
    try:
        answers, ready = ask_image(settings, engine, image, deep=deep)
    except BaseException:
        remove_leftovers(engine, whose=os.getpid())  # a signal may have cut a removal short
        raise
    report = _report(answers, target=name, seconds=time.monotonic() - began, ready=ready)
    if name == candidate:
        release.promote(settings, engine, image, report)
    return report


def smoke_url(settings: Settings, url: str) -> dict[str, Any]:
    """Ask a server that already runs what can be asked over HTTP; its password is that of the environment."""
    url = url if "://" in url else f"http://{url}"
    server = Server(url.rstrip("/"), os.environ.get(SECRET, ""), settings.smoke.request_seconds)
    began = time.monotonic()
    wait_ready(server, began + settings.smoke.ready_seconds)
    ready = time.monotonic() - began
    subject = probes.Subject(settings, server)
    answers = _ask([probe for probe in probes.PROBES if probe.needs == "server"], subject)
    return _report(answers, target=without_credentials(url), seconds=time.monotonic() - began, ready=ready)


def ask_image(
    settings: Settings, engine: Engine, image: dict[str, Any], *, deep: bool = False
) -> tuple[list[Answer], float]:
    """Start an image twice, once without a network, and ask every probe; return the answers and seconds to ready.

    The image is asked while its server starts; what is independent runs together. The second container starts with
    the first, or, after a conversation, while that starts once more: two servers that start keep two cores busy.
    """
    patience, password = settings.smoke, secrets.token_urlsafe(24)
    under_way: list[Future[Any]] = []
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(8) as pool:

        def begin(*call: Any) -> Future[Any]:
            with process.deferred():
                under_way.append(pool.submit(*call))
            return under_way[-1]

        try:
            offline = None if deep else begin(_with_offline, settings, engine, image)
            container = stack.enter_context(
                running(
                    engine,
                    image["Id"],
                    port=patience.port,
                    password=password,
                    env=conversation.environment() if deep else (),
                    timeout=patience.request_seconds,
                )
            )
            assert container.server is not None  # noqa: S101 -- it was published
            subject = probes.Subject(settings, container.server, engine, image, container)
            peer = begin(conversation.bring, container) if deep else None
            about_image = begin(_ask, probes.IMAGE_PROBES, subject)
            container.wait_ready(patience.ready_seconds)
            ready = Answer("ready", passed=True, seconds=container.ready_seconds, detail="/config answers 200")
            ok(f"{ready.name:14} {ready.seconds:5.2f} s  {ready.detail}")
            about_server = begin(_ask, probes.PROBES, subject)
            # Here and not in a thread: Ctrl-C ends what this one waits for, and a turn may take a minute.
            talked, talk = _converse(subject, peer) if peer else ([], None)
            wait([about_server, about_image])
            offline = offline or begin(_with_offline, settings, engine, image)
            if talk:
                talked.append(_answer(conversation.LAST, talk))
            answers = [ready, *about_server.result(), *about_image.result(), *offline.result(), *talked]
        except BaseException:
            # What the other threads wait for ends when its container does, however far it has come.
            enough = time.monotonic() + LEAVING_SECONDS
            while wait(under_way, timeout=0.3).not_done:
                remove_leftovers(engine, whose=os.getpid())
                if time.monotonic() > enough:
                    process.kill_all()  # podman exec, begun while its container is removed, may wait for ever
            raise
        if any(not answer.passed for answer in answers):
            say(container.logs())
    return answers, ready.seconds


def _with_offline(settings: Settings, engine: Engine, image: dict[str, Any]) -> list[Answer]:
    with running(engine, image["Id"], network="none") as container:
        answers = []
        for probe in probes.OFFLINE_PROBES:
            subject = probes.Subject(settings, Server(""), engine, image, container, offline=container)
            answers.append(_answer(probe, subject))
        return answers


def _converse(subject: probes.Subject, peer: Future[None]) -> tuple[list[Answer], conversation.Talk | None]:
    """Ask the deep probes, one after the other; what cannot even begin is the first one's answer."""
    try:
        peer.result()
        with conversation.begun(subject) as talk:
            return [_answer(probe, talk) for probe in conversation.PROBES], talk
    except (probes.Wrong, PipelineError, OSError) as error:
        detail = f"{type(error).__name__}: {error}"
        fail(f"{'conversation':14} {detail}")
        return [Answer("conversation", passed=False, seconds=0.0, detail=detail)], None


def _ask(some: Iterable[probes.Probe], subject: probes.Subject) -> list[Answer]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda probe: _answer(probe, subject), some))


def _answer(probe: probes.Probe, subject: probes.Subject) -> Answer:
    """Ask one probe; whatever it trips over is its answer, since one broken probe must not hide the others."""
    began = time.monotonic()
    try:
        passed, detail = True, probe.ask(subject)
    except probes.Wrong as wrong:
        passed, detail = False, str(wrong)
    except subprocess.TimeoutExpired as late:
        passed, detail = False, f"no answer within {late.timeout:g} s"
    except PipelineError as error:
        passed, detail = False, f"{error.what}\n{error.details}".strip()
    except Exception as error:  # noqa: BLE001 -- see above
        passed, detail = False, f"{type(error).__name__}: {error}"
    answer = Answer(probe.name, passed, time.monotonic() - began, detail)
    (ok if answer.passed else fail)(f"{answer.name:14} {answer.seconds:5.2f} s  {answer.detail}")
    return answer


def _report(answers: list[Answer], *, target: str, seconds: float, ready: float) -> dict[str, Any]:
    """Write ``build/smoke.json`` and ``build/smoke.xml``, say the sum, and raise SmokeFailed when a probe failed."""
    failed = [answer.name for answer in answers if not answer.passed]
    report = {
        "target": target,
        "finished": now(),
        "seconds": round(seconds, 2),
        "ready_seconds": round(ready, 2),
        "passed": not failed,
        "probes": [asdict(answer) | {"seconds": round(answer.seconds, 3)} for answer in answers],
    }
    write_json(BUILD / "smoke.json", report)
    _write_junit(answers, seconds)
    own = f"{seconds:.1f} s, {seconds - ready:.1f} s of them beyond waiting for the server"
    say(f"smoke: {len(answers) - len(failed)} of {len(answers)} probes passed in {own}; see build/smoke.json")
    if failed:
        raise SmokeFailed(
            f"{len(failed)} of {len(answers)} probes failed: {', '.join(failed)}",
            "Each says above what it got; latest still is what passed before.",
        )
    return report


def _write_junit(answers: list[Answer], seconds: float) -> None:
    failures = sum(not answer.passed for answer in answers)
    suite = ET.Element(
        "testsuite", name="smoke", tests=str(len(answers)), failures=str(failures), time=f"{seconds:.3f}"
    )
    for answer in answers:
        case = ET.SubElement(suite, "testcase", classname="smoke", name=answer.name, time=f"{answer.seconds:.3f}")
        if not answer.passed:
            detail = _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", answer.detail)
            ET.SubElement(case, "failure", message=detail[:200]).text = detail
    draft = BUILD / f"smoke.{os.getpid()}.part"
    ET.ElementTree(suite).write(draft, encoding="utf-8", xml_declaration=True)
    draft.replace(BUILD / "smoke.xml")


def _count(*, deep: bool) -> int:
    asked = (
        probes.PROBES,
        probes.IMAGE_PROBES,
        probes.OFFLINE_PROBES,
        (*conversation.PROBES, conversation.LAST) if deep else (),
    )
    return sum(map(len, asked)) + 1
