"""The launcher in a checkout of its own, with a PATH that holds what it may find and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.core.settings import ROOT

TASKS = """
import os, sys
from invoke import Exit, task

@task
def where(c, name="", code=0):
    "Say where this runs."
    print(f"cwd={os.getcwd()} prefix={sys.prefix} name={name}")
    raise Exit(code=code)
"""
TOOLS = ("cat", "cmp", "cp", "env", "flock", "mv", "rm", "sh")
PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
DEADLINE = 30


class Checkout:
    """A checkout with the real launcher, locks that hold only invoke unless ``whole``, and a PATH
    of its own.
    """

    def __init__(self, directory: Path, *, whole: bool = False) -> None:
        self.root = directory / "check out"  # paths with a space are where shebangs go wrong
        (self.root / "locks").mkdir(parents=True)
        shutil.copy2(ROOT / "inv", self.root / "inv")
        for name in ("tasks.txt", "dev.txt"):
            lock = (ROOT / "locks" / name).read_text()
            only = re.search(r"^invoke==(?:.*\\\n)+.*\n", lock, re.MULTILINE)
            assert only
            (self.root / "locks" / name).write_text(lock if whole else f"# {name}\n{only[0]}")
        (self.root / "tasks.py").write_text(TASKS)
        self.bin = directory / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, f"{tool} is not installed"
            (self.bin / tool).symlink_to(found)
        (self.bin / "python3").symlink_to(PYTHON)
        self.env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("INVOKE_", "VIRTUAL_"))
        }
        self.env["PATH"] = str(self.bin)

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    @property
    def stamp(self) -> Path:
        return self.venv / "made-from.txt"

    def program(self, name: str, script: str) -> None:
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)

    def give_uv(self, uv: str, before: str = "") -> None:
        self.program("uv", f"{before}\nPATH='{os.environ['PATH']}' exec '{uv}' \"$@\"")

    def start(self, *argv: str, cwd: Path | None = None, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.root / "inv", *argv],
            env=self.env | env,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def inv(
        self, *argv: str, cwd: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        child = self.start(*argv, cwd=cwd, **env)
        out, err = child.communicate(timeout=120)
        return subprocess.CompletedProcess(argv, child.returncode, out, err)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture(scope="module")
def uv(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real uv: this machine's, or the locked one."""
    found = shutil.which("uv")
    if not found:
        target = tmp_path_factory.mktemp("uv")
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--require-hashes",
            "--target",
            str(target),
        ]
        subprocess.run([*pip, "-r", str(ROOT / "locks" / "uv.txt")], check=True)
        found = str(target / "bin" / "uv")
    return found


def until(path: Path) -> None:
    end = time.monotonic() + DEADLINE
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come within {DEADLINE} s"
        time.sleep(0.01)


def test_with_uv_the_whole_lock_is_installed_once(tmp_path: Path, uv: str) -> None:
    checkout = Checkout(tmp_path, whole=True)
    checkout.give_uv(uv)
    first = checkout.inv("--list")
    assert (first.returncode, first.stderr) == (
        0,
        "inv: creating .venv from locks/tasks.txt with uv (first use)\n",
    )
    assert "where   Say where this runs." in first.stdout
    assert checkout.stamp.read_bytes() == (ROOT / "locks" / "tasks.txt").read_bytes()
    (checkout.bin / "uv").unlink()
    (checkout.bin / "python3").unlink()
    again = checkout.inv("--list", HOME="/nonexistent", https_proxy="http://127.0.0.1:9")
    assert (again.returncode, again.stderr, again.stdout) == (0, "", first.stdout)


def test_with_pip_the_users_own_constraints_do_no_harm(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path, whole=True)
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("requests<2\n")
    first = checkout.inv("--list", PIP_CONSTRAINT=str(constraints), PIP_USER="1")
    assert first.returncode == 0, first.stderr
    assert "with pip" in first.stderr
    assert "where   Say where this runs." in first.stdout
    assert checkout.inv("--list").stderr == ""


def test_arguments_directory_and_exit_code_are_the_users(
    checkout: Checkout, uv: str, tmp_path: Path
) -> None:
    checkout.give_uv(uv)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "invoke.py").write_text("raise SystemExit('the wrong invoke')")
    done = checkout.inv("where", "--name", "a b*", "--code", "7", cwd=elsewhere)
    assert done.returncode == 7, done.stderr
    assert done.stdout == f"cwd={elsewhere} prefix={checkout.venv} name=a b*\n"


def test_found_by_a_link_it_is_still_this_checkout(
    checkout: Checkout, uv: str, tmp_path: Path
) -> None:
    checkout.give_uv(uv)
    (tmp_path / "linked").symlink_to(checkout.root)
    real, checkout.root = checkout.root, tmp_path / "linked"
    assert f"prefix={real / '.venv'}" in checkout.inv("where").stdout


OLD = 'case $1 in --version) echo "Python 3.9.2" ;; esac'


@pytest.mark.parametrize(
    ("manager", "command"),
    [
        (
            "apt-get",
            "apt install python3 python3-venv (Debian 12, Ubuntu 24.04 and newer), or apt install python3.11",
        ),
        ("nothing", "install Python 3.11 or newer with your package manager"),
    ],
)
def test_an_old_python_gets_the_command_that_helps(
    checkout: Checkout, manager: str, command: str
) -> None:
    checkout.program("python3", OLD)
    checkout.program(manager, "")
    done = checkout.inv("--list")
    assert (done.returncode, done.stdout) == (11, "")
    assert (
        f"Python 3.11 or newer is required; python3 is Python 3.9.2. To repair: {command}"
        in done.stderr
    )
    assert not checkout.venv.exists()


def test_no_python_at_all(checkout: Checkout) -> None:
    (checkout.bin / "python3").unlink()
    done = checkout.inv("--list")
    assert done.returncode == 11
    assert "python3 is missing" in done.stderr


def test_a_newer_python_beside_the_old_one_is_taken(checkout: Checkout, uv: str) -> None:
    checkout.give_uv(uv)
    checkout.program("python3", OLD)
    (checkout.bin / "python3.11").symlink_to(PYTHON)
    assert checkout.inv("--list").returncode == 0


def test_debians_missing_venv_gets_the_command_that_helps(checkout: Checkout) -> None:
    # What Debian does without python3-venv: ensurepip cannot be imported.
    checkout.program(
        "python3",
        f'case $2 in *ensurepip*) exit 1 ;; *version_info*) echo "$0" ;; *) exec {PYTHON} "$@" ;; esac',
    )
    done = checkout.inv("--list")
    assert (done.returncode, done.stdout) == (11, "")
    assert done.stderr == "inv: python3 has no module venv. To repair: apt install python3-venv\n"


def test_killed_midway_it_is_made_again(checkout: Checkout, uv: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "never")
    checkout.give_uv(
        uv, f'case $1 in pip) : >"{tmp_path}/installing"; read -r _ <"{tmp_path}/never" ;; esac'
    )
    child = checkout.start("--list")
    until(tmp_path / "installing")
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    assert checkout.venv.exists()
    assert not checkout.stamp.exists()
    checkout.give_uv(uv)
    again = checkout.inv("--list")
    assert again.returncode == 0, again.stderr
    assert "creating .venv" in again.stderr


def test_of_two_at_once_one_makes_it_and_the_other_waits(
    checkout: Checkout, uv: str, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "go")
    checkout.give_uv(
        uv, f'case $1 in pip) : >"{tmp_path}/installing"; read -r _ <"{tmp_path}/go" ;; esac'
    )
    one = checkout.start("--list")
    until(tmp_path / "installing")
    two = checkout.start("--list")
    assert two.stderr
    assert two.stderr.readline() == "inv: waiting for another ./inv that creates .venv\n"
    (tmp_path / "go").write_text("go\n")
    for child, said in (
        (one, "inv: creating .venv from locks/tasks.txt with uv (first use)\n"),
        (two, ""),
    ):
        out, err = child.communicate(timeout=DEADLINE)
        assert (child.returncode, err) == (0, said)
        assert "where   Say where this runs." in out


def test_the_lock_is_not_held_while_tasks_run(checkout: Checkout, uv: str) -> None:
    checkout.give_uv(uv)
    (checkout.root / "tasks.py").write_text(
        "import subprocess\nfrom invoke import task\n@task\ndef free(c):\n"
        "    subprocess.run(['flock', '--nonblock', '.venv.lock', 'sh', '-c', ':'], check=True)\n"
    )
    assert checkout.inv("free", cwd=checkout.root).returncode == 0


@pytest.mark.parametrize(
    "name", ["plain", "with space"]
)  # the second has its interpreter not in the shebang
def test_a_copied_checkout_gets_its_own(
    checkout: Checkout, uv: str, tmp_path: Path, name: str
) -> None:
    checkout.root = checkout.root.rename(tmp_path / name)
    checkout.give_uv(uv)
    assert checkout.inv("--list").returncode == 0
    assert checkout.inv("--list").stderr == ""
    copy = tmp_path / f"{name} two"
    shutil.copytree(checkout.root, copy, symlinks=True)
    checkout.root = copy
    done = checkout.inv("where")
    assert "creating .venv" in done.stderr
    assert f"prefix={copy}/.venv" in done.stdout
    assert str(tmp_path / name / ".venv") not in (copy / ".venv/bin/invoke").read_text()


def test_a_changed_lock_is_followed_and_the_development_lock_is_as_good(
    checkout: Checkout, uv: str
) -> None:
    checkout.give_uv(uv)
    lock = checkout.root / "locks" / "tasks.txt"
    assert checkout.inv("--list").returncode == 0
    shutil.copy(checkout.root / "locks" / "dev.txt", checkout.stamp)
    assert checkout.inv("--list").stderr == ""
    checkout.stamp.write_bytes(lock.read_bytes())
    lock.write_text(lock.read_text() + "# changed\n")
    assert "creating .venv" in checkout.inv("--list").stderr
    assert checkout.stamp.read_bytes() == lock.read_bytes()


def test_a_python_that_went_away_is_noticed(checkout: Checkout, uv: str) -> None:
    checkout.give_uv(uv)
    assert checkout.inv("--list").returncode == 0
    (checkout.venv / "bin" / "python").unlink()
    (checkout.venv / "bin" / "python").symlink_to("/nonexistent/python3.11")
    assert checkout.inv("--list").returncode == 0


def test_what_is_not_in_the_lock_is_refused(checkout: Checkout, uv: str) -> None:
    checkout.give_uv(uv)
    lock = checkout.root / "locks" / "tasks.txt"
    lock.write_text(re.sub(r"sha256:\w{64}", f"sha256:{'0' * 64}", lock.read_text()))
    done = checkout.inv("--list")
    assert done.returncode == 11
    assert "could not be installed (see above)" in done.stderr
    assert not checkout.stamp.exists()


def test_an_index_that_does_not_answer_is_named(
    checkout: Checkout, uv: str, tmp_path: Path
) -> None:
    # PIP_INDEX_URL has to hold for uv too, which does not read it: what uv would find on PyPI must
    # not be taken.
    checkout.give_uv(uv, f'case $1 in pip) echo "$UV_DEFAULT_INDEX" >"{tmp_path}/index" ;; esac')
    nowhere = "http://127.0.0.1:9/simple"
    done = checkout.inv(
        "--list",
        PIP_INDEX_URL=nowhere,
        PIP_RETRIES="0",
        PIP_NO_CACHE_DIR="1",
        PIP_CONFIG_FILE=os.devnull,
        PIP_FIND_LINKS="",
        UV_HTTP_RETRIES="0",
        UV_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert (done.returncode, done.stdout) == (11, "")
    assert "Set PIP_INDEX_URL, PIP_CERT or a proxy" in done.stderr
    assert (tmp_path / "index").read_text() == f"{nowhere}\n"
    assert not checkout.stamp.exists()
