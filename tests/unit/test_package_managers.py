"""The uv with which bump compiles Python's locks."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core import process
from pipeline.core.settings import ROOT
from pipeline.release import package_managers

if TYPE_CHECKING:
    import pytest


def test_it_is_installed_once_however_many_ask_for_it_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    asked, second = threading.Barrier(2), threading.Event()
    installed: list[Path] = []

    def pip(argv: list[str], **_: Any) -> process.Completed:
        draft = Path(argv[argv.index("--target") + 1])
        draft.mkdir(exist_ok=True)
        installed.append(draft)
        second.set() if len(installed) > 1 else second.wait(0.5)
        return process.Completed(tuple(argv), 0, "", "", 0.0)

    def ask() -> str:
        asked.wait(60)
        return package_managers.uv(ROOT / "locks")

    monkeypatch.setattr(process, "run", pip)
    with ThreadPoolExecutor() as pool:
        found = {future.result(60) for future in [pool.submit(ask), pool.submit(ask)]}
    assert len(found) == len(installed) == 1
    assert Path(found.pop()).parents[1].is_dir()
