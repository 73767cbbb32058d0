"""This network's certificate authorities: which bundle is taken, and what of it is staged."""

import base64
import hashlib
import os
from pathlib import Path

import pytest

from pipeline.core.errors import SettingRefused
from pipeline.inputs import ca


def certificate(text: str) -> str:
    body = base64.encodebytes(text.encode() * 20).decode().strip()
    return f"-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----"


OURS, SECOND, PUBLIC = certificate("ours"), certificate("second"), certificate("public")


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host's bundle: one public certificate, two of the network, one of them twice, with words
    between them.
    """
    public = tmp_path / "mozilla"
    public.mkdir()
    (public / "Public.crt").write_text(PUBLIC.replace("\n", "\r\n"))
    monkeypatch.setattr(ca, "PUBLIC", public)
    path = tmp_path / "bundle.pem"
    path.write_text(f"# The office's\n{OURS}\n{PUBLIC}\n{SECOND}\n{OURS}\n")
    return path


def test_the_setting_comes_first_then_the_variables_in_order(bundle: Path) -> None:
    environ = {"PIP_CERT": str(bundle), "SSL_CERT_FILE": ""}
    assert ca.source("", {}) is None
    assert ca.source("", environ) == ("PIP_CERT", bundle)
    environ["CURL_CA_BUNDLE"] = str(bundle)
    assert ca.source("", environ) == ("CURL_CA_BUNDLE", bundle)
    assert ca.source(str(bundle), {"SSL_CERT_FILE": "/nowhere"}) == ("ca", bundle)


@pytest.mark.parametrize(
    ("setting", "environ"), [("/nowhere", {}), ("", {"NODE_EXTRA_CA_CERTS": "/nowhere"})]
)
def test_a_bundle_that_cannot_be_read_is_named(
    setting: str, environ: dict[str, str], tmp_path: Path
) -> None:
    name = "ca" if setting else "NODE_EXTRA_CA_CERTS"
    with pytest.raises(SettingRefused, match=f"{name}=/nowhere: the file cannot be read"):
        ca.source(setting, environ)
    with pytest.raises(SettingRefused, match="cannot be read"):
        ca.source(str(tmp_path), {})


@pytest.mark.parametrize("text", ["", "\x30\x82\x03\x1f", "-----BEGIN CERTIFICATE-----"])
def test_a_bundle_without_pem_is_named_and_not_staged(
    bundle: Path, tmp_path: Path, text: str
) -> None:
    staged = tmp_path / "extra.crt"
    ca.stage(str(bundle), {}, staged)
    bundle.write_text(text)
    with pytest.raises(SettingRefused, match=f"PIP_CERT={bundle}: the file has no PEM certificate"):
        ca.extra("", {"PIP_CERT": str(bundle)})
    with pytest.raises(SettingRefused, match="ca="):
        ca.stage(str(bundle), {}, staged)
    assert staged.read_text() == f"{OURS}\n{SECOND}\n"


@pytest.mark.usefixtures("bundle")
def test_what_a_user_has_put_beside_ours_is_staged_too(tmp_path: Path) -> None:
    folder = tmp_path / "ca"
    assert ca.staged(folder) == {}
    folder.mkdir()
    (folder / "extra.crt").write_text(f"{OURS}\n{PUBLIC}\n")
    (folder / "office.crt").write_text(SECOND)
    (folder / "notes.txt").write_text(certificate("not copied"))
    assert list(ca.staged(folder).values()) == [OURS, SECOND]
    assert ca.stage("", {}, folder / "extra.crt") == 2


def test_public_ones_are_left_out_and_each_is_there_once(bundle: Path) -> None:
    assert list(ca.extra(str(bundle), {}).values()) == [OURS, SECOND]
    assert ca.extra("", {}) == {}


def test_staging_writes_once_and_leaves_what_says_the_same_untouched(
    bundle: Path, tmp_path: Path
) -> None:
    staged = tmp_path / "extra.crt"
    assert ca.stage(str(bundle), {}, staged) == 2
    assert staged.read_text() == f"{OURS}\n{SECOND}\n"
    os.utime(staged, (1, 1))
    assert ca.stage(str(bundle), {}, staged) == 2
    assert staged.stat().st_mtime == 1
    bundle.write_text(SECOND)
    assert ca.stage(str(bundle), {}, staged) == 1
    assert staged.read_text() == f"{SECOND}\n"
    # A build in a shell without the variable keeps what the fetch was given.
    assert ca.stage("", {}, staged) == 1
    assert staged.read_text() == f"{SECOND}\n"
    # A bundle of public ones only empties it: a CA of another network must not reach the next
    # build.
    bundle.write_text(PUBLIC)
    assert ca.stage(str(bundle), {}, staged) == 0
    assert staged.read_text() == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bundle.pem",
        "extra.crt",
        "mozilla",
    ]


def test_an_edited_certifi_is_no_list_of_public_ones(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "certifi-1.dist-info"
    (tmp_path / "certifi").mkdir()
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: certifi\nVersion: 1\n")
    published = f"{SECOND}\n".encode()
    digest = base64.urlsafe_b64encode(hashlib.sha256(published).digest()).rstrip(b"=").decode()
    (info / "RECORD").write_text(f"certifi/cacert.pem,sha256={digest},{len(published)}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "certifi/cacert.pem").write_bytes(published)
    assert [*ca.extra(str(bundle), {}).values()] == [OURS]
    (tmp_path / "certifi/cacert.pem").write_bytes(published + OURS.encode())
    assert [*ca.extra(str(bundle), {}).values()] == [OURS, SECOND]
