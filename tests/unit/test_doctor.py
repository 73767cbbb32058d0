from __future__ import annotations

import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import EngineBroken, LockBroken, NoEngine
from pipeline.core.settings import Settings, load
from pipeline.engines import detect
from pipeline.engines.engine import Engine
from pipeline.host import doctor
from pipeline.inputs import ca
from pipeline.inputs.rootfs import Lock

HERE = Engine("podman", "/usr/bin/podman", "4.3.1")
PEM = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
PUBLIC = PEM.replace("MIIB", "MIIC")


@pytest.fixture
def settings() -> Settings:
    return load({}, {})


def stub_engines(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def answering(name: str) -> Engine:
        if name in names:
            return HERE
        raise NoEngine(f"/usr/bin/{name}: no daemon answers", "")

    monkeypatch.setattr(detect, "answering", answering)
    monkeypatch.setattr(detect, "prove", lambda found: found)
    monkeypatch.setattr(detect, "remembered", None)  # a remembered engine may be broken by now


def test_a_client_without_a_daemon_is_only_a_warning_beside_an_engine_that_works(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    stub_engines(monkeypatch, "podman")
    working, rows = doctor.check_engines(settings)
    assert working == [HERE]
    assert [(row.what, row.state) for row in rows] == [
        ("python", "ok"),
        ("podman", "ok"),
        ("docker", "warn"),
    ]
    assert rows[2].detail == "/usr/bin/docker: no daemon answers"
    assert "start its daemon" in rows[2].remedy


def test_no_engine_is_a_failure_and_the_table_comes_first(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    stub_engines(monkeypatch)
    quiet = doctor.Row("x", "ok", "")
    for question in ("registry", "git_host", "npm", "pypi", "debian"):
        monkeypatch.setattr(doctor, question, lambda *_: quiet)
    with pytest.raises(NoEngine) as none:
        doctor.doctor(settings)
    assert none.value.code == 12
    assert capsys.readouterr().out.count("no daemon answers") == 2


def test_an_engine_that_the_settings_exclude_is_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_engines(monkeypatch, "podman")
    working, rows = doctor.check_engines(load({"engine": "docker"}, {}))
    assert working == []
    assert [row.state for row in rows if row.what == "docker"] == ["FAIL"]


def test_an_engine_that_starts_nothing_says_why(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    def prove(_found: Engine) -> Engine:
        raise EngineBroken("cannot start a container: crun: cgroups", "Install runc.")

    stub_engines(monkeypatch, "podman")
    monkeypatch.setattr(detect, "prove", prove)
    row = doctor.check_engines(settings)[1][1]
    assert row == doctor.Row(
        "podman", "FAIL", "cannot start a container: crun: cgroups", "Install runc."
    )


@pytest.mark.parametrize(("free", "state"), [(5e9, "warn"), (7e9, "ok")])
def test_free_space_of_every_place_that_a_build_writes_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: float, state: str
) -> None:
    class Usage:
        def __init__(self) -> None:
            self.free = free

    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _path: Usage())  # type: ignore[attr-defined]
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(doctor.tempfile, "gettempdir", lambda: str(tmp_path))  # type: ignore[attr-defined]
    row = doctor.space([Engine("podman", "podman", "4", store=str(tmp_path))])
    assert row.state == state
    each = f"{free / 1e9:.1f} GB for"
    assert row.detail == f"{each} repository, {each} temporary files, {each} podman"


def test_a_missing_program_is_a_warning_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    row = doctor.program("git", "Install git.")
    assert row == ("git", "warn", "not installed", "Install git.")


@pytest.mark.parametrize(
    ("text", "state", "detail"),
    [
        (PEM, "ok", ": 1 certificates, 1 of them not public"),
        (PUBLIC, "ok", ", 0 of them not public"),
        ("", "FAIL", ": the file has no PEM certificate"),
    ],
)
def test_a_bundle_is_counted(
    tmp_path: Path,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    state: str,
    detail: str,
) -> None:
    (tmp_path / "Public.crt").write_text(PUBLIC)
    monkeypatch.setattr(ca, "PUBLIC", tmp_path)
    bundle = tmp_path / "ca.pem"
    bundle.write_text(text)
    row = doctor.answer(lambda: doctor.authorities(settings, {"SSL_CERT_FILE": str(bundle)}))
    assert row.state == state
    assert row.detail.startswith(f"{bundle} (from SSL_CERT_FILE)") or state == "FAIL"
    assert row.detail.endswith(detail)


def test_a_bundle_that_is_not_there(settings: Settings) -> None:
    row = doctor.answer(lambda: doctor.authorities(settings, {"PIP_CERT": "/nonexistent.pem"}))
    assert (row.state, row.detail) == (
        "FAIL",
        "PIP_CERT=/nonexistent.pem: the file cannot be read",
    )


def test_no_bundle_is_fine(settings: Settings) -> None:
    assert doctor.authorities(settings, {}).state == "ok"


def test_a_taken_port_is_seen_and_a_free_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        assert doctor.port(number).state == "warn"
    assert doctor.port(number).state == "ok"


def test_a_question_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SECONDS", 0.2)
    began = time.monotonic()
    row = doctor.ask("slow", [sys.executable, "-c", "import time; time.sleep(60)"], "Wait.")
    assert row == doctor.Row("slow", "FAIL", "no answer within 0.2 s", "Wait.")
    assert time.monotonic() - began < 10


def test_an_answer_a_refusal_and_a_missing_tool() -> None:
    assert doctor.ask("x", [sys.executable, "-c", ""], "Mend it.").state == "ok"
    refusal = "import sys; sys.exit('first\\nlast')"
    assert doctor.ask("x", [sys.executable, "-c", refusal], "Mend it.") == (
        "x",
        "FAIL",
        "last",
        "Mend it.",
    )
    assert doctor.ask("x", ["/nonexistent/tool"], "Mend it.").state == "warn"


def test_the_registry_is_asked_as_the_engine_would(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def ask(*args: Any, **_: Any) -> doctor.Row:
        seen.append(args)
        return doctor.Row("x", "ok", "")

    monkeypatch.setattr(doctor, "ask", ask)
    doctor.registry("", [HERE])
    doctor.registry("registry.example/library/node", [HERE])
    digest = Lock.read().digest
    assert seen[0][:2] == (
        "Docker Hub",
        ["/usr/bin/podman", "manifest", "inspect", f"node@{digest}"],
    )
    assert seen[1][1][-1] == f"registry.example/library/node@{digest}"
    assert doctor.registry("", []).detail == "not checked: no engine works"


def test_a_broken_lock_is_a_row() -> None:
    def question() -> doctor.Row:
        raise LockBroken("base.json: cut short", "git checkout locks")

    assert doctor.answer(question) == (
        "LockBroken",
        "FAIL",
        "base.json: cut short",
        "git checkout locks",
    )


def test_a_mirror_of_ones_own_is_asked_itself() -> None:
    row = doctor.debian(load({"base": {"debian_mirror": "http://127.0.0.1:9/debian"}}, {}))
    assert row.state == "FAIL"
    assert row.detail.startswith("http://127.0.0.1:9/debian: ")


def test_the_git_host_of_the_settings_is_asked(tmp_path: Path) -> None:
    row = doctor.git_host(load({"openagents": {"url": str(tmp_path / "none.git")}}, {}))
    assert (row.what, row.state) == ("git host", "warn")
