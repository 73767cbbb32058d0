from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from pipeline import base, engine, host, process
from pipeline.engine import Engine
from pipeline.errors import EngineBroken, NoEngine, SetupFailed, ToolMissing
from pipeline.settings import ROOT

HERE = Engine("podman", "/usr/bin/podman", "4.3.1", flags=("--runtime", "runc"))

APT = set(host.PACKAGES["apt-get"].split()) - {"netavark|containernetworking-plugins"}
AVAILABLE = {
    "debian 12": APT | {"netavark", "containernetworking-plugins"},
    # podman 3.4 and no passt; the plugins of CNI in netavark's place
    "ubuntu 22.04": APT - {"aardvark-dns", "passt"} | {"containernetworking-plugins"},
    "ubuntu 24.04": APT | {"netavark", "containernetworking-plugins"},
}


@pytest.mark.parametrize("system", ["debian 12", "ubuntu 24.04"])
def test_newer_systems_get_netavark_and_not_cni(system: str) -> None:
    assert host.choose(host.PACKAGES["apt-get"].split(), AVAILABLE[system]) == [
        "podman", "netavark", "aardvark-dns", "iptables", "nftables", "catatonit", "runc", "uidmap", "slirp4netns",
        "passt", "fuse-overlayfs", "mmdebstrap", "debian-archive-keyring", "ca-certificates", "git",
    ]  # fmt: skip


def test_ubuntu_22_04_gets_cni_and_nothing_it_does_not_have() -> None:
    assert host.choose(host.PACKAGES["apt-get"].split(), AVAILABLE["ubuntu 22.04"]) == [
        "podman", "containernetworking-plugins", "iptables", "nftables", "catatonit", "runc", "uidmap", "slirp4netns",
        "fuse-overlayfs", "mmdebstrap", "debian-archive-keyring", "ca-certificates", "git",
    ]  # fmt: skip


def test_fedora_gets_what_it_has() -> None:
    available = {"podman", "netavark", "aardvark-dns", "iptables-nft", "nftables", "passt", "ca-certificates", "git"}
    assert host.choose(host.PACKAGES["dnf"].split(), available) == [
        "podman", "netavark", "aardvark-dns", "iptables-nft", "nftables", "passt", "ca-certificates", "git",
    ]  # fmt: skip


def test_without_lists_the_first_names_are_taken() -> None:
    assert host.choose(["a|b", "c"], set()) == ["a", "c"]


APT_INSTALL = [
    "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "--yes", "--no-install-recommends", "--no-upgrade",
    "--option", "DPkg::Lock::Timeout=300", "podman", "git",
]  # fmt: skip
DNF_INSTALL = ["dnf", "install", "--assumeyes", "--setopt=install_weak_deps=False", "podman", "git"]


@pytest.mark.parametrize(("root", "sudo", "prefix"), [(True, True, []), (False, True, ["sudo"]), (False, False, [])])
@pytest.mark.parametrize(("manager", "argv"), [("apt-get", APT_INSTALL), ("dnf", DNF_INSTALL)])
def test_install_argv(manager: host.Manager, argv: list[str], root: bool, sudo: bool, prefix: list[str]) -> None:  # noqa: FBT001
    assert host.install_argv(manager, ["podman", "git"], root=root, sudo=sudo) == [[*prefix, *argv]]


def test_brew_never_gets_sudo() -> None:
    argvs = host.install_argv("brew", host.PACKAGES["brew"].split(), root=False, sudo=True)
    assert argvs == [["brew", "install", "podman", "git"]]


def test_a_mac_needs_a_machine_and_keeps_the_one_it_has() -> None:
    start = ["podman", "machine", "start"]
    assert host.machine_argv("") == [["podman", "machine", "init"], start]
    assert host.machine_argv("podman-machine-default*\n") == [start]


def test_missing_lists_are_fetched(tmp_path: Path) -> None:
    assert host.refresh_argv("apt-get", root=True, sudo=False, lists=tmp_path) == [["apt-get", "update"]]
    assert host.refresh_argv("apt-get", root=False, sudo=True, lists=tmp_path) == [["sudo", "apt-get", "update"]]
    assert host.refresh_argv("dnf", root=True, sudo=False, lists=tmp_path) == []


def test_fresh_lists_are_kept_and_old_ones_renewed(tmp_path: Path) -> None:
    (tmp_path / "mirror_main_binary-amd64_Packages.lz4").touch()
    assert host.refresh_argv("apt-get", root=True, sudo=False, lists=tmp_path) == []
    os.utime(tmp_path, (0, 0))
    assert host.refresh_argv("apt-get", root=True, sudo=False, lists=tmp_path) == [["apt-get", "update"]]


class Machine:
    """A machine of stub programs: what they were called with, and whether an engine answers."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bin = directory / "bin"
        self.bin.mkdir()
        self.called = directory / "called"
        self.called.touch()
        self.answers: list[Engine | Exception] = []
        monkeypatch.setenv("PATH", str(self.bin))
        monkeypatch.setattr(host, "SBIN", ())
        monkeypatch.setattr(host, "LISTS", directory / "lists")
        monkeypatch.setattr(engine, "find", self.find)
        monkeypatch.setattr(engine, "prove", lambda found: found)
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
        names = " ".join(name for entry in host.PACKAGES["apt-get"].split() for name in entry.split("|"))
        policy = f'for n in {names}; do printf "%s:\\n  Installed: (none)\\n  Candidate: 1\\n" $n; done'
        self.program("apt-cache", policy)
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


def test_nothing_to_do_says_which_engine_answers(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.apt()
    machine.answers = [HERE]
    host.setup("auto")
    assert "podman 4.3.1 (/usr/bin/podman), with --runtime runc answers" in capsys.readouterr().out
    assert machine.calls == []


def test_an_engine_is_installed_and_proven(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    machine.apt()
    machine.answers = [NONE, HERE]
    host.setup("auto")
    out = capsys.readouterr().out
    assert "installing podman, netavark, aardvark-dns, iptables" in out
    assert "env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends --no-upgrade" in out
    assert "has started a container" in out
    assert machine.calls[0] == "apt-get update"
    assert machine.calls[-1].startswith("apt-get install --yes --no-install-recommends --no-upgrade")
    assert machine.calls[-1].endswith(
        "podman netavark aardvark-dns iptables nftables catatonit runc uidmap slirp4netns passt fuse-overlayfs"
        " mmdebstrap debian-archive-keyring ca-certificates git"
    )


def test_a_broken_engine_gets_what_it_may_lack(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    machine.apt()
    machine.answers = [EngineBroken("no networks", ""), HERE]
    host.setup("auto")
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
    host.setup("auto")
    installs = [call for call in machine.calls if call.startswith("apt-get install")]
    assert [call.split()[-2:] for call in installs] == ([] if reach else [["mmdebstrap", "debian-archive-keyring"]])


def test_dry_run_changes_nothing(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.apt()
    machine.answers = [NONE]
    host.setup("auto", dry_run=True)
    assert "apt-get update && " in capsys.readouterr().out
    assert all(call.startswith("apt-cache") for call in machine.calls)


def test_without_root_and_sudo_the_command_is_printed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    machine.apt()
    machine.answers = [NONE]
    with pytest.raises(SetupFailed, match=r"Run this as root.*apt-get update && env DEBIAN.*apt-get install.*podman"):
        host.setup("auto")
    assert all(call.startswith("apt-cache") for call in machine.calls)


def test_without_root_sudo_is_used(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    machine.apt()
    machine.program("sudo", 'exec "$@"')
    machine.answers = [NONE, HERE]
    host.setup("auto")
    sudo = [call for call in machine.calls if call.startswith("sudo")]
    assert sudo[0] == "sudo apt-get update"
    assert sudo[1].startswith("sudo env DEBIAN_FRONTEND=noninteractive apt-get install")


def test_a_failing_manager_is_quoted(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    machine.apt(install='echo "E: dpkg was interrupted"; exit 100')
    machine.answers = [NONE]
    with pytest.raises(SetupFailed, match="E: dpkg was interrupted") as failed:
        host.setup("auto")
    assert failed.value.code == 15


def test_no_manager_says_what_to_install(machine: Machine) -> None:
    machine.answers = [NONE]
    with pytest.raises(SetupFailed, match="Install by hand what your system calls: podman, netavark"):
        host.setup("auto")


def test_a_manager_without_podman(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    machine.apt()
    machine.program("apt-cache", 'printf "git:\\n  Installed: (none)\\n  Candidate: 1\\n"')
    machine.answers = [NONE]
    with pytest.raises(SetupFailed, match="apt-get has no podman"):
        host.setup("auto")


def test_docker_is_not_installed_for_those_who_ask_for_it(machine: Machine) -> None:
    machine.apt()
    machine.answers = [NoEngine("no daemon answers", "")]
    with pytest.raises(SetupFailed, match="no daemon answers"):
        host.setup("docker")


def test_what_the_tests_need_is_what_is_missing(machine: Machine) -> None:
    machine.program("dockerd")
    machine.program("openssl")
    assert host.lacking("apt-get", engine=True, tests=False) == []
    tools = ["docker-compose", "docker-registry", "iptables", "iproute2", "rclone", "redis-tools"]
    tools += ["cron", "faketime", "apache2-utils", "systemd"]
    assert host.lacking("apt-get", engine=True, tests=True) == tools
    tools = ["docker-compose", "docker-distribution", "iptables-nft", "iproute", "rclone", "redis"]
    tools += ["cronie", "libfaketime", "httpd-tools", "systemd"]
    assert host.lacking("dnf", engine=True, tests=True) == tools


def test_git_alone_may_be_missing(machine: Machine) -> None:
    (machine.bin / "git").unlink()
    assert host.lacking("apt-get", engine=True, tests=False) == ["git"]


def test_what_apt_only_refers_to_is_not_available(machine: Machine) -> None:
    machine.program(
        "apt-cache", 'printf "a:\\n  Installed: (none)\\n  Candidate: (none)\\nb:\\n  Installed: 1\\n  Candidate: 2\\n"'
    )
    assert host._available("apt-get", ["a|b"]) == {"b"}


def test_tools_of_the_project_file_are_looked_for(tmp_path: Path) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text('[project.optional-dependencies]\ndev = ["pytest>=8", "no-such-tool>=1", "ruff"]\n')
    assert host.missing_tools(project) == ["no-such-tool"]


def test_an_interpreter_that_is_not_ours_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "missing_tools", lambda: ["mypy"])
    with pytest.raises(ToolMissing, match=r"mypy.*--require-hashes -r locks/dev.txt"):
        host.ensure_dev_tools(tmp_path)


@pytest.mark.parametrize(("code", "stamped"), [(0, True), (1, False)])
def test_tools_are_installed_with_hashes_and_stamped(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    stamped: bool,  # noqa: FBT001
) -> None:
    seen = []

    def run(argv: list[str], *, env: dict[str, str]) -> process.Completed:
        seen.append((argv, env))
        return process.Completed(tuple(argv), code, "", "no answer", 0)

    venv = tmp_path / ".venv"
    venv.mkdir()
    monkeypatch.setattr(host, "missing_tools", lambda: ["mypy"])
    monkeypatch.setattr(sys, "prefix", str(venv))
    monkeypatch.setattr(process, "run", run)
    if code:
        with pytest.raises(SetupFailed, match="no answer"):
            host.ensure_dev_tools(venv)
    else:
        host.ensure_dev_tools(venv)
    (argv, env), lock = seen[0], ROOT / "locks" / "dev.txt"
    assert argv[-4:] == ["--quiet", "--require-hashes", "-r", str(lock)]
    assert env["UV_CONSTRAINT"] == ""
    assert (venv / "made-from.txt").exists() == stamped
    assert not stamped or (venv / "made-from.txt").read_bytes() == lock.read_bytes()


def test_pip_is_used_where_there_is_one_and_uv_elsewhere() -> None:
    assert host.dev_argv(Path("x"), pip=True)[:4] == [sys.executable, "-m", "pip", "install"]
    assert host.dev_argv(Path("x"), pip=False)[:5] == ["uv", "pip", "install", "--python", sys.executable]


def test_uv_is_told_what_pip_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    monkeypatch.setenv("PIP_CERT", "/office.pem")
    monkeypatch.setenv("SSL_CERT_FILE", "/mine.pem")
    monkeypatch.delenv("UV_DEFAULT_INDEX", raising=False)
    env = host.tool_env()
    assert env["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
    assert "SSL_CERT_FILE" not in env
