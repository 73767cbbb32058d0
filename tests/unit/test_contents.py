"""What is inside an image, and what differs between two: what is asked, kept, compared and said."""

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import process
from pipeline.core.errors import (
    ContentsUnreadable,
    DiskFull,
    NoSuchImage,
    NotTheSame,
    PipelineError,
    SbomFailed,
)
from pipeline.core.settings import Settings
from pipeline.engines.engine import Engine
from pipeline.image import contents, diff

ENGINE = Engine("docker", "/d", "20.10")

INSIDE: dict[str, Any] = {
    "system": "Debian GNU/Linux 12 (bookworm), 12.15",
    "debian": "12",
    "node": "v20.1.0",
    "packages": {
        "debian": {"git": ["1:2", 9_000_000, "git", "1:2"]},
        "npm": {"zod": ["4", 5]},
        "python": {},
    },
}
FILES = {
    "/opt": ["drwxr-xr-x", "0:0", 0, 1, ""],
    "/opt/a": ["-rw-r--r--", "0:0", 10, 1, "aa"],
    "/opt/link": ["lrwxrwxrwx", "0:0", 0, 1, "a"],
    "/usr/bin/x": ["-rwxr-xr-x", "0:0", 10, 1, "bb"],
}


def image(*layers: str, name: str = "i", **config: Any) -> dict[str, Any]:
    return {
        "Id": f"sha256:{name}",
        "Size": 750_000_000,
        "RootFS": {"Layers": list(layers)},
        "Config": config,
    }


class Images:
    """Stands for process.run: images by name, and what each says when it is looked into."""

    def __init__(self, **images: dict[str, Any]) -> None:
        self.images, self.inside = images, dict.fromkeys(images, INSIDE)
        self.looked: list[list[str]] = []
        self.failing: dict[str, str] = {}

    def __call__(self, argv: list[str], **_: Any) -> process.Completed:
        code, out = 0, ""
        if argv[1:3] == ["image", "inspect"]:
            name = argv[3].removesuffix(":latest")
            code, out = (0, json.dumps([self.images[name]])) if name in self.images else (1, "")
        elif argv[1] == "run":
            self.looked.append(argv)
            name = next(word for word in argv if word.startswith("sha256:")).removeprefix("sha256:")
            out = json.dumps(
                {**self.inside[name], **({"files": FILES} if argv[-1] == "files" else {})}
            )
        elif argv[0].endswith("syft"):
            Path(argv[-1].removeprefix("spdx-json=")).write_text("{}")
        word = "syft" if argv[0].endswith("syft") else argv[1]
        said = self.failing.get(word, "")
        return process.Completed(tuple(argv), 1 if said else code, out, said, 0.0)


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Images]:
    monkeypatch.setattr(contents, "BUILD", tmp_path)
    monkeypatch.setattr(diff, "BUILD", tmp_path)
    monkeypatch.setattr(contents, "ensure_dev_tools", lambda: None)

    def images(**images: dict[str, Any]) -> Images:
        made = Images(**images)
        monkeypatch.setattr(process, "run", made)
        return made

    return images


def test_an_image_is_looked_into_by_its_own_python_without_a_network(
    use: Callable[..., Images],
) -> None:
    images = use(i=image("a"))
    assert contents.read(ENGINE, image("a")) == INSIDE
    assert contents.read(ENGINE, image("a"), files=True)["files"] == FILES
    [argv, _] = images.looked
    name = argv[argv.index("--name") + 1]
    assert name.startswith("opencode-server-contents-")
    assert argv == [
        *("/d", "run", "--rm", "--name", name, "--network", "none"),
        *("--user", "0", "--cap-drop", "all", "--cap-add", "DAC_READ_SEARCH"),
        *("--no-healthcheck", "--entrypoint", "/usr/bin/python3"),
        *("sha256:i", "-S", "-I", "-c", contents.INVENTORY),
    ]


def test_a_node_without_fixes_is_named(
    use: Callable[..., Images], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(i=image("a", name="i"))
    settings = Settings.model_validate({"advisories": {"url": ""}})
    for epoch, ended in (("1777507200", False), ("1777600000", True)):  # April 30 and May 1, 2026
        monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
        contents.contents(settings, ENGINE, "i", sbom=False)
        assert ("Node 20 has had no fixes since 2026-04-30" in capsys.readouterr().out) == ended


def test_one_that_cannot_be_looked_into_is_named(use: Callable[..., Images]) -> None:
    images = use(i=image("a"))
    images.failing["run"] = "exec: /usr/bin/python3: not found"
    with pytest.raises(ContentsUnreadable, match="docker cannot read the contents of i"):
        contents.read(ENGINE, image("a"))
    with pytest.raises(NoSuchImage, match="docker has no image nobody"):
        contents.find(ENGINE, "nobody", "opencode-server")


def test_a_bare_word_is_a_tag_of_ours_before_it_is_another_image(
    use: Callable[..., Images],
) -> None:
    use(
        **{
            "ours:one": image("a", name="ours"),
            "one": image("a", name="another"),
            "two": image("a", name="two"),
        }
    )
    assert [
        contents.find(ENGINE, word, "ours")["Id"][7:] for word in ("one", "two", "one:latest")
    ] == [*("ours", "two", "another")]


def test_the_bill_of_materials_is_syfts(use: Callable[..., Images], tmp_path: Path) -> None:
    use(i=image("a"))
    assert contents.write_sbom(ENGINE, image("a")) == tmp_path / "sbom.spdx.json"
    argv = contents.sbom_argv(Path("/x.tar"), Path("/o.json"))
    assert argv[0] == str(Path(sys.executable).parent / "syft")
    assert argv[1:] == [
        *("scan", "docker-archive:/x.tar", "--quiet", "--source-name", "opencode-server"),
        *("--output", "spdx-json=/o.json"),
    ]


@pytest.mark.parametrize(
    ("said", "failure"),
    [("could not parse", SbomFailed), ("write /tmp/x: no space left on device", DiskFull)],
)
def test_a_bill_that_cannot_be_written_is_named_and_the_last_one_stays(
    use: Callable[..., Images], tmp_path: Path, said: str, failure: type[PipelineError]
) -> None:
    use(i=image("a")).failing["syft"] = said
    (tmp_path / "sbom.spdx.json").write_text("the last one")
    with pytest.raises(failure, match="syft") as caught:
        contents.write_sbom(ENGINE, image("a"))
    assert caught.value.details == said
    assert [path.read_text() for path in tmp_path.iterdir()] == ["the last one"]


BEFORE = image(
    "a",
    Env=["PATH=/bin", "OLD=1", "A=b=c"],
    Labels={"org.opencontainers.image.created": "1"},
    Cmd=["x"],
)
BEFORE_INSIDE = {**INSIDE, "files": FILES}


def test_two_images_that_are_the_same() -> None:
    after = deepcopy(BEFORE) | {"Id": "sha256:other"}
    after["Config"]["Labels"] = {"org.opencontainers.image.created": "2"}
    later = deepcopy(BEFORE_INSIDE)
    later["files"]["/opt"][3] = 2
    found = diff.compare(BEFORE, after, BEFORE_INSIDE, later)
    assert found.same
    assert found.times == ["/opt"]
    assert found.settings == [("label org.opencontainers.image.created", "1", "2")]


def test_what_differs() -> None:
    after = image(
        "a",
        Env=["PATH=/usr/bin", "A=b=c"],
        Labels=None,
        Entrypoint=["tini"],
        ExposedPorts={"1/tcp": {}},
    )
    after |= {"Size": 751_000_000, "Healthcheck": {"Test": ["CMD", "x"]}}
    later = deepcopy(BEFORE_INSIDE)
    later["packages"] |= {
        "debian": {"git": ["1:3", 9_000_001, "git", "1:3"]},
        "npm": {},
        "python": {"redis": ["8", 7]},
    }
    later["files"] = {
        "/opt": FILES["/opt"],
        "/opt/a": ["-rw-------", "1:0", 12, 2, "cc"],
        "/opt/link": ["lrwxrwxrwx", "0:0", 0, 1, "b"],
        "/opt/new": ["-rw-r--r--", "0:0", 5, 1, "dd"],
    }
    found = diff.compare(BEFORE, after, BEFORE_INSIDE, later)
    assert not found.same
    assert found.size == (750_000_000, 751_000_000)
    assert found.settings == [
        ("cmd", '["x"]', ""),
        ("entrypoint", "", '["tini"]'),
        ("env OLD", "1", ""),
        ("env PATH", "/bin", "/usr/bin"),
        ("exposedports", "", '{"1/tcp": {}}'),
        ("healthcheck", "", '{"Test": ["CMD", "x"]}'),
        ("label org.opencontainers.image.created", "1", ""),
    ]
    assert found.packages == [
        ("debian git", "1:2", "1:3"),
        ("npm zod", "4", ""),
        ("python redis", "", "8"),
    ]
    assert found.files == {
        "/opt/a": ("mode, owner, content", 2),
        "/opt/link": ("content", 0),
        "/opt/new": ("new", 5),
        "/usr/bin/x": ("gone", -10),
    }


def test_it_fits_a_screen_and_all_of_it_is_written(
    use: Callable[..., Images], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = use(
        one=image("a", name="one"), two=image("b", name="two", Env=[f"V{n}=1" for n in range(40)])
    )
    images.inside["two"] = {
        **INSIDE,
        "packages": {**INSIDE["packages"], "npm": {f"p{n}": ["1", n] for n in range(40)}},
    }
    diff.diff(Settings(), ENGINE, "one", "two")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 50
    assert lines[:2] == ["diff: one -> two", "750.0 MB -> 750.0 MB (+0.0 MB)"]
    assert "and 28 more in build/diff.json" in lines
    written = json.loads((tmp_path / "diff.json").read_text())
    assert (len(written["settings"]), len(written["packages"])) == (40, 41)
    with pytest.raises(NotTheSame, match="one and two differ"):
        diff.diff(Settings(), ENGINE, "one", "two", same=True)
    diff.diff(Settings(), ENGINE, "one", "one", same=True)
    assert capsys.readouterr().out.endswith(
        "the content and the settings are the same\n0 files differ in their times\n"
    )


def test_every_file_is_named_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"/opt/venv/{n}": ("new", 1000 * n) for n in range(40)}
    found = diff.Difference((1, 1), [], [], files=files, times=["/opt"])
    diff.show(found)
    short = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "/opt/venv/39 new +39,000" in short, "the largest first"
    assert "and 28 more in build/diff.json" in short
    diff.show(found, every=True)
    every = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert {f"/opt/venv/{n} new {1000 * n:+,d}" for n in range(40)} <= set(every)
    assert "time /opt" in every
    assert "1 files differ in their times" in every
