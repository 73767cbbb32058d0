"""The page about the nights: what is on it, and that nothing in a log can become part of it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from pipeline.release import history, html_report

if TYPE_CHECKING:
    import pytest

EVIL = "</pre><script>alert(1)</script>&\"'"


def night(number: int, outcome: str, **more: Any) -> dict[str, Any]:
    return {"kind": "night", "at": f"2027-01-{number:02}T03:17:00Z", "outcome": outcome, **more}


HISTORY = [
    night(
        1,
        "released",
        tag="20270101-aaaaaaa",
        size=780e6,
        build_seconds=50,
        ready_seconds=2,
        moves=["a 1 -> 2"],
    ),
    night(2, "unchanged"),
    night(3, "failed", where="build", why=f"it broke {EVIL}", details=f"last words {EVIL}"),
    night(4, "skipped", why="no network"),
    {"kind": "rollback", "at": "2027-01-04T09:00:00Z", "to": "previous", "tag": "20270101-aaaaaaa"},
    night(
        5,
        "released",
        tag="20270105-bbbbbbb",
        size=790e6,
        build_seconds=60,
        ready_seconds=3,
        moves=["b 1 -> 2"],
    ),
]


class Tags(HTMLParser):
    """Counts what is opened, and checks that it is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, _attrs: Any) -> None:
        self.seen.append(tag)
        if tag not in {"meta", "line", "circle", "polyline"} or tag == "circle":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, _attrs: Any) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_it_holds_what_people_ask_and_nothing_from_elsewhere() -> None:
    text = html_report.page(HISTORY, damaged=2)
    tags = Tags(text)
    assert "script" not in tags.seen
    assert not re.search(r"""(src|href)=|url\(|@import""", text)
    assert text.count("<li ") == 5
    assert "The last night ended 2027-01-05 03:17" in text
    assert "2 released, 1 unchanged, 1 failed, 1 skipped" in text
    assert "2 damaged lines of the history are ignored" in text
    assert "last words &lt;/pre&gt;" in text
    assert "20270105-bbbbbbb: b 1 \N{RIGHTWARDS ARROW} 2" in text
    assert "790.0 MB now, 780.0 to 790.0" in text
    assert text.rindex("20270105-bbbbbbb: b") < text.rindex("20270101-aaaaaaa: a"), (
        "the newest comes first"
    )


def test_plots_are_xml_whatever_the_values() -> None:
    for values in ([5.0], [5.0, 5.0], [0.0, 0.0], list(range(100))):
        records = [{"kind": "night", "at": "2027-01-01T00:00:00Z", "v": value} for value in values]
        drawn = html_report.plot(records, "Title", "v", "s")
        svg = ET.fromstring(drawn)  # noqa: S314 -- ours
        spots = [float(circle.attrib["cy"]) for circle in svg.iter("circle")]
        assert len(spots) == min(len(values), html_report.NIGHTS)
        assert all(0 <= spot <= 120 for spot in spots)
    assert "Nothing measured yet." in html_report.plot([], "Title", "v", "s")


def test_an_empty_history_is_a_page_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "FILE", tmp_path / "history.jsonl")
    written = html_report.write(str(tmp_path / "sub" / "report.html"))
    Tags(written.read_text())
    assert "There was no night yet." in written.read_text()
    assert [path.name for path in written.parent.iterdir()] == ["report.html"]
