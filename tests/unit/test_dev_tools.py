"""The development tools: what is missing, and how it is installed."""

import sys
from pathlib import Path

import pytest

from pipeline.core import dev_tools, process
from pipeline.core.errors import SetupFailed, ToolMissing
from pipeline.core.pip import install_argv, tool_env
from pipeline.core.settings import ROOT


def test_tools_of_the_project_file_are_looked_for(tmp_path: Path) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text(
        '[project.optional-dependencies]\ndev = ["pytest>=8", "no-such-tool>=1", "ruff"]\n'
    )
    assert dev_tools.missing_tools(project) == ["no-such-tool"]


def test_an_interpreter_that_is_not_ours_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dev_tools, "missing_tools", lambda: ["mypy"])
    with pytest.raises(ToolMissing, match=r"mypy.*--require-hashes -r locks/dev.txt"):
        dev_tools.ensure_dev_tools(tmp_path)


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
    monkeypatch.setattr(dev_tools, "missing_tools", lambda: ["mypy"])
    monkeypatch.setattr(sys, "prefix", str(venv))
    monkeypatch.setattr(process, "run", run)
    if code:
        with pytest.raises(SetupFailed, match="no answer"):
            dev_tools.ensure_dev_tools(venv)
    else:
        dev_tools.ensure_dev_tools(venv)
    (argv, env), lock = seen[0], ROOT / "locks" / "dev.txt"
    assert argv[-4:] == ["--quiet", "--require-hashes", "-r", str(lock)]
    assert env["UV_CONSTRAINT"] == ""
    assert (venv / "made-from.txt").exists() == stamped
    assert not stamped or (venv / "made-from.txt").read_bytes() == lock.read_bytes()


def test_pip_is_used_where_there_is_one_and_uv_elsewhere() -> None:
    assert install_argv(Path("x"), pip=True)[:4] == [sys.executable, "-m", "pip", "install"]
    assert install_argv(Path("x"), pip=False)[:5] == [
        "uv",
        "pip",
        "install",
        "--python",
        sys.executable,
    ]


def test_uv_is_told_what_pip_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    monkeypatch.setenv("PIP_CERT", "/office.pem")
    monkeypatch.setenv("SSL_CERT_FILE", "/mine.pem")
    monkeypatch.delenv("UV_DEFAULT_INDEX", raising=False)
    env = tool_env()
    assert env["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
    assert env["SSL_CERT_FILE"] == "/mine.pem"
