"""What people read: as it was said, in any locale, and without passwords."""

import io
import sys

import pytest

from pipeline.core import console


def test_what_is_said_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = "COPY :warning: [bold]x[/bold] a:100:b"
    for print_it in (console.log, console.ok, console.warn, console.fail):
        print_it(text)
    console.table("steps", ("step",), [(text,)])
    assert [text in line for line in capsys.readouterr().out.splitlines() if "COPY" in line] == [
        True
    ] * 5


def test_what_the_locale_cannot_show_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    with io.TextIOWrapper(out, encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        console.console.__wrapped__().print("Müller: \N{CHECK MARK}", markup=False)
        stream.flush()
        assert out.getvalue() == b"M?ller: ?\n"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (
            "https://user:secret@git.example.com:8443/a/b.git",
            "https://git.example.com:8443/a/b.git",
        ),
        ("https://token@git.example.com/a", "https://git.example.com/a"),
        ("https://git.example.com/a@b", "https://git.example.com/a@b"),
        ("/srv/git/a.git", "/srv/git/a.git"),
        ("git@git.example.com:a/b.git", "git@git.example.com:a/b.git"),
        ("", ""),
    ],
)
def test_no_password_gets_into_what_is_for_everyone_to_read(url: str, shown: str) -> None:
    assert console.without_credentials(url) == shown
