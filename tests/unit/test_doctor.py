from __future__ import annotations

import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import ca, doctor, engine
from pipeline.engine import Engine
from pipeline.errors import EngineBroken, LockBroken, NoEngine
from pipeline.settings import Settings, load

HERE = Engine("podman", "/usr/bin/podman", "4.3.1")
PEM = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
PUBLIC = PEM.replace("MIIB", "MIIC")


@pytest.fixture
def settings() -> Settings:
    return load({}, {})


def stub_engines(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def look(name: str) -> tuple[Engine | None, list[str]]:
        return (HERE, []) if name in names else (None, [f"/usr/bin/{name}: no daemon answers"])

    monkeypatch.setattr(engine, "look", look)
    monkeypatch.setattr(engine, "prove", lambda found: found)
    monkeypatch.setattr(engine, "adapt", None)  # what was remembered may have broken since


def test_a_client_without_a_daemon_is_only_a_warning_beside_an_engine_that_works(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    stub_engines(monkeypatch, "podman")
    working, rows = doctor.look_at_engines(settings)
    assert working == [HERE]
    assert [(row.what, row.state) for row in rows] == [("python", "ok"), ("podman", "ok"), ("docker", "warn")]
    assert rows[2].detail == "/usr/bin/docker: no daemon answers"
    assert "start its daemon" in rows[2].remedy


def test_no_engine_is_a_failure_and_the_table_comes_first(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    stub_engines(monkeypatch)
    quiet = doctor.Row("x", "ok", "")
    for question in ("registry", "git_host", "npm", "pypi", "debian"):
        monkeypatch.setattr(doctor, question, lambda *_: [quiet])
    with pytest.raises(NoEngine) as none:
        doctor.doctor(settings)
    assert none.value.code == 12
    assert capsys.readouterr().out.count("no daemon answers") == 2


def test_an_engine_that_the_settings_exclude_is_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_engines(monkeypatch, "podman")
    working, rows = doctor.look_at_engines(load({"engine": "docker"}, {}))
    assert working == []
    assert [row.state for row in rows if row.what == "docker"] == ["FAIL"]


def test_an_engine_that_starts_nothing_says_why(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    def prove(_found: Engine) -> Engine:
        raise EngineBroken("cannot start a container", "Install runc.", "first line\ncrun: cgroups")

    stub_engines(monkeypatch, "podman")
    monkeypatch.setattr(engine, "prove", prove)
    row = doctor.look_at_engines(settings)[1][1]
    assert row == doctor.Row("podman", "FAIL", "cannot start a container crun: cgroups", "Install runc.")


@pytest.mark.parametrize(("free", "state"), [(5e9, "warn"), (7e9, "ok")])
def test_space_is_asked_once_a_file_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: float, state: str
) -> None:
    class Usage:
        def __init__(self) -> None:
            self.free = free

    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _path: Usage())  # type: ignore[attr-defined]
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(doctor.tempfile, "gettempdir", lambda: str(tmp_path))  # type: ignore[attr-defined]
    (row,) = doctor.space([Engine("podman", "podman", "4", store=str(tmp_path))])
    assert row.state == state
    assert row.detail == f"{free / 1e9:.1f} GB free for podman, repository, temporary files"


def test_missing_programs_are_warnings_with_a_remedy() -> None:
    rows = doctor.programs({"PATH": "/nonexistent"})
    assert [(row.what, row.state) for row in rows] == [("git", "warn"), ("npm", "warn"), ("mmdebstrap", "warn")]
    assert all(row.remedy for row in rows)


@pytest.mark.parametrize(
    ("text", "state", "detail"),
    [
        (PEM, "ok", ": 1 certificates, 1 of them not public"),
        (PUBLIC, "ok", ", 0 of them not public"),
        ("", "FAIL", ", which holds no PEM certificate"),
    ],
)
def test_a_bundle_is_counted(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, text: str, state: str, detail: str
) -> None:
    (tmp_path / "Public.crt").write_text(PUBLIC)
    monkeypatch.setattr(ca, "PUBLIC", tmp_path)
    bundle = tmp_path / "ca.pem"
    bundle.write_text(text)
    (row,) = doctor.authorities(settings, {"SSL_CERT_FILE": str(bundle)})
    assert row.state == state
    assert row.detail.startswith(f"SSL_CERT_FILE names {bundle}")
    assert row.detail.endswith(detail)


def test_a_bundle_that_is_not_there(settings: Settings) -> None:
    (row,) = doctor.authorities(settings, {"PIP_CERT": "/nonexistent.pem"})
    assert (row.state, row.detail) == ("FAIL", "PIP_CERT names /nonexistent.pem, which cannot be read")


def test_no_bundle_is_fine(settings: Settings) -> None:
    assert doctor.authorities(settings, {})[0].state == "ok"


def test_a_taken_port_is_seen_and_a_free_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        assert doctor.port(number)[0].state == "warn"
    assert doctor.port(number)[0].state == "ok"


def test_a_question_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SECONDS", 0.2)
    began = time.monotonic()
    row = doctor._ask("slow", [sys.executable, "-c", "import time; time.sleep(60)"], "Wait.")
    assert row == doctor.Row("slow", "FAIL", "no answer within 0.2 s", "Wait.")
    assert time.monotonic() - began < 10


def test_an_answer_a_refusal_and_a_missing_tool() -> None:
    assert doctor._ask("x", [sys.executable, "-c", ""], "Mend it.").state == "ok"
    refusal = "import sys; sys.exit('first\\nlast')"
    assert doctor._ask("x", [sys.executable, "-c", refusal], "Mend it.") == ("x", "FAIL", "last", "Mend it.")
    assert doctor._ask("x", ["/nonexistent/tool"], "Mend it.").state == "warn"


def test_the_registry_is_asked_as_the_engine_would(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def ask(*args: Any, **_: Any) -> doctor.Row:
        seen.append(args)
        return doctor.Row("x", "ok", "")

    monkeypatch.setattr(doctor, "_ask", ask)
    doctor.registry("", [HERE])
    doctor.registry("registry.example/library/node", [HERE])
    digest = doctor.base.Lock.read().digest  # type: ignore[attr-defined]
    assert seen[0][:2] == ("Docker Hub", ["/usr/bin/podman", "manifest", "inspect", f"node@{digest}"])
    assert seen[1][1][-1] == f"registry.example/library/node@{digest}"
    assert doctor.registry("", [])[0].detail == "unknown: no engine to ask with"


def test_a_broken_lock_is_a_row() -> None:
    def question() -> list[doctor.Row]:
        raise LockBroken("base.json: cut short", "git checkout locks")

    assert doctor._answer(question) == [("LockBroken", "FAIL", "base.json: cut short", "git checkout locks")]


def test_a_mirror_of_ones_own_is_asked_itself() -> None:
    (row,) = doctor.debian(load({"base": {"debian_mirror": "http://127.0.0.1:9/debian"}}, {}))
    assert row.state == "FAIL"
    assert row.detail.startswith("http://127.0.0.1:9/debian: ")


def test_the_git_host_of_the_settings_is_asked(tmp_path: Path) -> None:
    row = doctor.git_host(load({"openagents": {"url": str(tmp_path / "none.git")}}, {}))[0]
    assert (row.what, row.state) == ("git host", "warn")
