from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from pipeline.core.errors import EngineBroken, NoEngine, SetupFailed
from pipeline.engines import detect
from pipeline.engines.engine import Engine
from pipeline.host import setup
from pipeline.inputs import base

HERE = Engine("podman", "/usr/bin/podman", "4.3.1", flags=("--runtime", "runc"))


class Machine:
    """A machine of stub programs: what they were called with, and whether an engine answers."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bin = directory / "bin"
        self.bin.mkdir()
        self.called = directory / "called"
        self.called.touch()
        self.answers: list[Engine | Exception] = []
        monkeypatch.setenv("PATH", str(self.bin))
        monkeypatch.setattr(setup, "SBIN", ())
        monkeypatch.setattr(detect, "find", self.find)
        monkeypatch.setattr(detect, "prove", lambda found: found)
        self.program("git")
        self.program("mmdebstrap")

    def find(self, _setting: str) -> Engine:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def program(self, name: str, script: str = "") -> None:
        path = self.bin / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>{self.called}\n{script}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def apt(self, install: str = "") -> None:
        self.program("apt-get", f"case $1 in install) {install or ':'} ;; esac")
        # env is given a PATH of stubs, so it has to be one of them
        self.program("env", 'shift; exec "$@"')

    @property
    def calls(self) -> list[str]:
        return self.called.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


NONE = NoEngine("podman is not installed", "")


def test_nothing_to_do_says_which_engine_answers(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.apt()
    machine.answers = [HERE]
    setup.setup("auto")
    assert "podman 4.3.1 (/usr/bin/podman), with --runtime runc works" in capsys.readouterr().out
    assert machine.calls == []


def test_an_engine_is_installed_and_proven(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    machine.apt()
    machine.answers = [NONE, HERE]
    setup.setup("auto")
    out = capsys.readouterr().out
    assert "installing podman, netavark, aardvark-dns, iptables" in out
    assert (
        "env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends --no-upgrade"
        in out
    )
    assert "has started a container" in out
    assert machine.calls[0] == "apt-get update"
    assert machine.calls[-1].startswith(
        "apt-get install --yes --no-install-recommends --no-upgrade"
    )
    assert machine.calls[-1].endswith(
        "podman netavark aardvark-dns iptables nftables catatonit runc uidmap slirp4netns passt fuse-overlayfs"
        " mmdebstrap debian-archive-keyring ca-certificates git"
    )


def test_a_broken_engine_gets_what_it_may_lack(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    machine.apt()
    machine.answers = [EngineBroken("no networks", ""), HERE]
    setup.setup("auto")
    assert "netavark" in machine.calls[-1]


@pytest.mark.parametrize("reach", [True, False])
def test_where_an_engine_is_and_no_registry_what_makes_the_base_is_brought(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, *, reach: bool
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(base, "within_reach", lambda _engine: reach)
    machine.apt()
    (machine.bin / "mmdebstrap").unlink()
    machine.answers = [HERE]
    setup.setup("auto")
    installs = [call for call in machine.calls if call.startswith("apt-get install")]
    assert [call.split()[-2:] for call in installs] == (
        [] if reach else [["mmdebstrap", "debian-archive-keyring"]]
    )


def test_dry_run_changes_nothing(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.apt()
    machine.answers = [NONE]
    setup.setup("auto", dry_run=True)
    assert "apt-get update && " in capsys.readouterr().out
    assert machine.calls == []


def test_without_root_and_sudo_the_command_is_printed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    machine.apt()
    machine.answers = [NONE]
    with pytest.raises(
        SetupFailed,
        match=r"As root: apt-get update && env DEBIAN.*apt-get install.*podman",
    ):
        setup.setup("auto")
    assert machine.calls == []


def test_without_root_sudo_is_used(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    machine.apt()
    machine.program("sudo", 'exec "$@"')
    machine.answers = [NONE, HERE]
    setup.setup("auto")
    sudo = [call for call in machine.calls if call.startswith("sudo")]
    assert sudo[0] == "sudo apt-get update"
    assert sudo[1].startswith("sudo env DEBIAN_FRONTEND=noninteractive apt-get install")


def test_a_failing_manager_is_quoted(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    machine.apt(install='echo "E: dpkg was interrupted"; exit 100')
    machine.answers = [NONE]
    with pytest.raises(SetupFailed, match="E: dpkg was interrupted") as failed:
        setup.setup("auto")
    assert failed.value.code == 15


def test_no_manager_says_what_to_install(machine: Machine) -> None:
    machine.answers = [NONE]
    with pytest.raises(
        SetupFailed, match=r"Install podman 4\.3 or newer and git with your package manager"
    ):
        setup.setup("auto")


def test_docker_is_not_installed_for_those_who_ask_for_it(machine: Machine) -> None:
    machine.apt()
    machine.answers = [NoEngine("no daemon answers", "")]
    with pytest.raises(SetupFailed, match="no daemon answers"):
        setup.setup("docker")


def test_what_the_tests_need_is_what_is_missing(machine: Machine) -> None:
    machine.program("dockerd")
    machine.program("openssl")
    assert setup.missing(engine=True, tests=False) == []
    tools = ["docker-compose", "docker-registry", "iptables", "iproute2", "openssh-server"]
    tools += ["rclone", "redis-tools", "cron", "faketime", "apache2-utils", "caddy", "systemd"]
    assert setup.missing(engine=True, tests=True) == tools


def test_git_alone_may_be_missing(machine: Machine) -> None:
    (machine.bin / "git").unlink()
    assert setup.missing(engine=True, tests=False) == ["git"]
