"""What must not be in a layer is planted in one, and found; what is harmless is not."""

import base64
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import certifi
import pytest

from pipeline.core import process
from pipeline.core.errors import DiskFull, EngineBroken, PipelineError
from pipeline.engines.engine import Engine
from pipeline.image import secret_scan
from pipeline.image.secret_scan import Findings, scan, secrets_in
from pipeline.inputs import ca
from tests.leaks import leaks


def certificate(text: str) -> str:
    body = base64.encodebytes(text.encode() * 20).decode().strip()
    return f"-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n"


def key(kind: str = "") -> str:
    return f"-----BEGIN {kind}PRIVATE KEY-----\n{'QUJD' * 16}\n-----END {kind}PRIVATE KEY-----\n"


OFFICE, PUBLIC = certificate("office"), certificate("public")
EXTRA = ca.certificates(OFFICE)

# None of these is whole in this file: a scanner of this repository would find it too.
TOKENS = {
    "aws": "AKIA" + "IOSFODNN7" + "ABCDEFG",
    "github": "ghp" + "_" + "a1B2" * 9,
    "fine-grained": "github" + "_pat_" + "a1B2c3" * 12,
    "npm": "npm" + "_" + "a1B2" * 9,
    "openai": "sk-" + "proj-" + "a1B2" * 12,
    "anthropic": "sk-" + "ant-" + "a1B2" * 12,
    "openai of old": "sk-" + "a1B2" * 5 + "T3Blbk" + "FJ" + "a1B2" * 5,
    "aws for an hour": "ASIA" + "IOSFODNN7" + "ABCDEFG",
    "gitlab": "glpat" + "-" + "a1B2" * 5,
    "google": "AIza" + "a1B2-" * 7,
    "b2": "K00" + "5" + "aB1/" * 6 + "cD3",
    "jwt": ".".join(("ey" + "JhbGciOiJIUzI1NiJ9", "ey" + "JzdWIiOiIxMjM0NTY3ODkwIn0", "x1Y2" * 8)),
    "datadog": "DD_API" + "_KEY: " + "0f1e2d3c" * 4,
    "aws's other half": "aws_secret" + "_access_key=" + "a1B2" * 10,
}
CANARIES = {
    "root/.ssh/id_ed25519": "-",
    "app/.env": "A=1",
    "app/.env.production": "A=1",
    "root/.npmrc": "//registry/:_authToken=x",
    "root/.netrc": "machine x",
    "root/.git-credentials": "https://x:y@z",
    "root/.docker/config.json": "{}",
    "opt/openagents/.git/HEAD": "ref: refs/heads/main",
    "root/.config/rclone/rclone.conf": "[b2]",
    "root/.local/share/opencode/auth.json": "{}",
    "root/.bash_history": "ls",
    "app/.envrc": "A=1",
    "app/client.p12": "x",
    "root/.npm/_logs/2026-debug-0.log": "x",
    "root/.cache/pip/http/a": "x",
    "app/upload": 'API_KEY="a1b2c3d4e5f6a7b8" rclone',
    "opt/openagents/config.json": '{"apiKey": "0123456789abcdef", "token": "{env:TOKEN}"}',
    "etc/server.key": key("RSA "),
    "etc/other.key": key(),
    **{f"srv/{name}.txt": f"token = '{token}'\n" for name, token in TOKENS.items()},
}
HARMLESS = {
    "app/.env.example": "A=",
    "app/environment": "A=1",
    "opt/node/test/keys.md": "Files begin with -----BEGIN PRIVATE KEY----- and a newline.",
    "opt/docs.txt": f"AKIA{'IOSFODNN7'}EXAMPLE, ghp_short, npm_config_cache, sk-proj-x",
    "usr/share/ca-certificates/mozilla/Public.crt": PUBLIC,
    "etc/ssl/certs/ca-certificates.crt": PUBLIC,
    "opt/venv/lib/python3.11/site-packages/certifi/cacert.pem": PUBLIC
    + certificate("another public one"),
    "usr/lib/binary": "\0" + key(),
    "opt/gitignore": ".git",
    "app/code": "token = base64.b64encode(x); api_key = os.environ['API_KEY']; password: your-password-here",
    "opt/venv/settings.py": 'API_KEY = "a1b2c3d4e5f6a7b8"',
    "opt/hashes": "K005"
    + "aB1/" * 10
    + " sk-learn-something-that-is-long-enough-to-look-like-a-key DD_API_KEY=",
}


def plant(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def in_directory(root: Path) -> Iterator[secret_scan.Entry]:
    return secret_scan._in_directory(root)


def in_tar(root: Path) -> Iterator[secret_scan.Entry]:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as made:
        made.add(root, arcname=".")
    stream.seek(0)
    with tarfile.open(fileobj=stream) as layer:
        yield from secret_scan._in_tar(layer)


@pytest.fixture(params=[in_directory, in_tar], ids=["directory", "tar"])
def entries(request: pytest.FixtureRequest) -> Callable[[Path], Iterator[secret_scan.Entry]]:
    return request.param  # type: ignore[no-any-return]


def test_every_canary_is_found(
    tmp_path: Path, entries: Callable[[Path], Iterator[secret_scan.Entry]]
) -> None:
    found = scan(entries(plant(tmp_path, CANARIES | HARMLESS))).secrets
    assert sorted(found) == sorted(
        [
            "root/.ssh/id_ed25519",
            "app/.env",
            "app/.env.production",
            "root/.npmrc",
            "root/.netrc",
            "root/.git-credentials",
            "root/.docker/config.json",
            "opt/openagents/.git",
            "root/.config/rclone/rclone.conf",
            "root/.local/share/opencode/auth.json",
            "root/.bash_history",
            "app/.envrc",
            "app/client.p12",
            "root/.npm/_logs",
            "root/.cache/pip",
            "app/upload (holds API_KEY=…)",
            "opt/openagents/config.json (holds apiKey=…)",
            "etc/server.key (holds -----BEGIN R…)",
            "etc/other.key (holds -----BEGIN P…)",
            *(f"srv/{name}.txt (holds {token[:12]}…)" for name, token in TOKENS.items()),
        ]
    )


@pytest.mark.parametrize("path", leaks())
def test_a_leak_as_people_leave_them_is_found(tmp_path: Path, path: str) -> None:
    root = plant(tmp_path, {path: f"# before\n{leaks()[path]}\n"})
    assert len(scan(in_directory(root)).secrets) >= 1


def test_bundles_of_public_authorities_hold_neither_a_secret_nor_a_ca_of_this_network(
    tmp_path: Path,
) -> None:
    """Of certifi as it is, and with an authority that Mozilla dropped: AffirmTrust Premium ECC."""
    dropped = (
        "MIIB/jCCAYWgAwIBAgIIdJclisc/elQwCgYIKoZIzj0EAwMwRTELMAkGA1UEBhMCVVMxFDASBgNVBAoMC0FmZmlybVRy"
        "dXN0MSAwHgYDVQQDDBdBZmZpcm1UcnVzdCBQcmVtaXVtIEVDQzAeFw0xMDAxMjkxNDIwMjRaFw00MDEyMzExNDIwMjRa"
        "MEUxCzAJBgNVBAYTAlVTMRQwEgYDVQQKDAtBZmZpcm1UcnVzdDEgMB4GA1UEAwwXQWZmaXJtVHJ1c3QgUHJlbWl1bSBF"
        "Q0MwdjAQBgcqhkjOPQIBBgUrgQQAIgNiAAQNMF4bFZ0D0KF5Nbc6PJJ6yhUczWLznCZcBz3lVPqj1swS6vQUX+iOGasv"
        "LkjmrBhDeKzQN8O9ss0s5kfiGuZjuD0uL3jET9v0D6RoTFVya5UdThhClXjMNzyR4ptlKymjQjBAMB0GA1UdDgQWBBSa"
        "ryl6wBE1NSZRMADDav5A1a7WPDAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwIBBjAKBggqhkjOPQQDAwNnADBk"
        "AjAXCfOHiFBar8jAQr9HX/VsaobgxCd05DhT1wV/GzTjxi+zygk8N53X57hG8f2h4nECMEJZh0PUUd+60wkyWs6Iflc9"
        "nF9Ca/UHLbXwgpP5WW+uZPpY5Yse42O+tYHNbwKMeQ=="
    )
    public = Path(certifi.where()).read_text()
    assert dropped not in "".join(public.split())
    bundle = tmp_path / "bundle.pem"
    block = f"-----BEGIN CERTIFICATE-----\n{dropped}\n-----END CERTIFICATE-----\n"
    bundle.write_text(f"{public}\n{block}{OFFICE}")
    assert [*ca.extra(str(bundle), {}).values()] == [OFFICE.strip()]
    assert scan(in_directory(tmp_path)).secrets == []


def test_a_clean_tree_is_clean(
    tmp_path: Path, entries: Callable[[Path], Iterator[secret_scan.Entry]]
) -> None:
    plant(tmp_path, HARMLESS)
    (tmp_path / "dangling").symlink_to("/nowhere/.env.not")
    (tmp_path / "loop").symlink_to(tmp_path)
    findings = scan(entries(tmp_path))
    assert findings.secrets == []
    assert sorted(findings.certificates) == sorted(
        path for path, text in HARMLESS.items() if "CERTIFICATE" in text
    )


def test_a_file_too_large_to_be_a_key_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, {"big.log": key()})
    assert scan(in_directory(tmp_path)).secrets
    monkeypatch.setattr(secret_scan, "TEXT_LIMIT", 50)
    assert scan(in_directory(tmp_path)) == Findings()


def test_only_the_beginning_of_a_secret_is_shown() -> None:
    for token in TOKENS.values():
        assert secrets_in(f"x {token} y".encode()) == [token[:12]]
        assert len(token) > 19


@dataclass(frozen=True)
class Archive(Engine):
    """An engine with one image: its history, and, for `save`, the tar of its layers."""

    history: str = "/bin/sh -c apt-get update"
    saved: Path | None = None
    refuses: str = ""
    asked: list[str] = field(default_factory=list)

    def ask(self, argv: Any, **_: Any) -> process.Completed:
        self.asked.append(argv[1])
        if argv[1] == "save" and self.refuses:
            return process.Completed(tuple(argv), 125, "", self.refuses, 0.0)
        if argv[1] == "save":
            assert self.saved
            shutil.copy(self.saved, argv[argv.index("--output") + 1])
        return process.Completed(
            tuple(argv), 0, self.history if argv[1] == "history" else "", "", 0.0
        )


def image(*directories: Path, digests: int, **config: Any) -> dict[str, Any]:
    """An inspection; overlay lists the directories below the top one from the highest down."""
    upper, *lower = [str(directory) for directory in reversed(directories)] or [""]
    data = {"UpperDir": upper, "LowerDir": ":".join(lower)} if directories else {}
    return {
        "Id": "sha256:i",
        "Config": config,
        "RootFS": {"Layers": [f"sha256:{n}" for n in range(digests)]},
        "GraphDriver": {"Name": "overlay", "Data": data},
    }


@pytest.fixture(autouse=True)
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(secret_scan, "BUILD", tmp_path / "build")
    return tmp_path / "build"


def test_a_layer_is_looked_at_once(
    tmp_path: Path, build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    low, high = plant(tmp_path / "low", HARMLESS), plant(tmp_path / "high", {"app/.env": "A=1"})
    engine = Archive("podman", "/p", "4")
    subject = image(low, high, digests=2)
    faults = ["/app/.env"]
    assert secret_scan.check(engine, subject, {}) == (faults, 2)
    kept = json.loads((build / "layers.json").read_text())["layers"]
    assert kept["sha256:1"]["secrets"] == ["app/.env"]
    assert kept["sha256:0"]["secrets"] == []
    (high / "app" / ".env").unlink()
    assert secret_scan.check(engine, subject, {}) == (faults, 2)
    monkeypatch.setattr(secret_scan, "RULES", "other rules")
    assert secret_scan.check(engine, subject, {}) == ([], 2)
    subject["RootFS"]["Layers"] = ["sha256:2", "sha256:0"]
    assert secret_scan.check(engine, subject, {}) == ([], 2)
    known = json.loads((build / "layers.json").read_text())["layers"]
    assert list(known) == ["sha256:2", "sha256:0"], "only those of the last image are kept"
    (build / "layers.json").write_text('{"rules": "other ru')  # torn: they are looked at again
    assert secret_scan.check(engine, subject, {}) == ([], 2)
    assert json.loads((build / "layers.json").read_text())["rules"] == "other rules"
    assert engine.asked == ["history"] * 5


def test_a_ca_of_this_network_is_found_wherever_it_is(tmp_path: Path) -> None:
    system = plant(tmp_path / "system", HARMLESS)
    bundle = plant(
        tmp_path / "bundle",
        {"etc/ssl/certs/ca-certificates.crt": PUBLIC + OFFICE, "tmp/ca.pem": PUBLIC},
    )
    engine = Archive("podman", "/p", "4")
    subject = image(system, bundle, digests=2)
    faults, _ = secret_scan.check(engine, subject, EXTRA)
    assert faults == ["/etc/ssl/certs/ca-certificates.crt holds a CA of this network"]
    # One that the image's own Debian package carries is public, however old the list here is.
    assert secret_scan.check(engine, subject, ca.certificates(PUBLIC)) == ([], 2)


def test_where_the_layers_cannot_be_read_the_engine_writes_them_out(tmp_path: Path) -> None:
    outer = tmp_path / "saved.tar"
    planted = [
        plant(tmp_path / "a", HARMLESS),
        plant(tmp_path / "b", {"root/.npmrc": "x", "ca.pem": OFFICE}),
    ]
    with tarfile.open(outer, "w") as saved:
        for number, root in enumerate(planted):
            with tarfile.open(tmp_path / f"{number}.tar", "w") as layer:
                layer.add(root, arcname=".")
            saved.add(tmp_path / f"{number}.tar", arcname=f"{number}.tar")
        manifest = json.dumps([{"Layers": ["0.tar", "1.tar"]}]).encode()
        member = tarfile.TarInfo("manifest.json")
        member.size = len(manifest)
        saved.addfile(member, io.BytesIO(manifest))
    engine = Archive("docker", "/d", "20", saved=outer)
    faults, count = secret_scan.check(engine, image(digests=2), EXTRA)
    assert (faults, count) == (["/root/.npmrc", "/ca.pem holds a CA of this network"], 2)
    assert engine.asked == ["save", "history"]


@pytest.mark.parametrize(
    ("said", "failure"),
    [("write /x: No space left on device", DiskFull), ("Error: layer not known", EngineBroken)],
)
def test_an_image_that_cannot_be_written_out_says_why(
    build: Path, said: str, failure: type[PipelineError]
) -> None:
    with pytest.raises(failure, match=r"save --output .* exited with 125") as caught:
        secret_scan.check(Archive("docker", "/d", "20", refuses=said), image(digests=2), {})
    assert type(caught.value) is failure
    assert caught.value.details == said
    assert not build.exists()


@pytest.mark.parametrize(
    ("history", "fault"),
    [
        (f"RUN curl -H 'token: {TOKENS['github']}'", "the history holds ghp_a1B2a1B2…"),
        (f"RUN echo '{OFFICE}' > /ca", "the history holds a certificate"),
        (f"ENV KEY={TOKENS['openai']}", "the history holds sk-proj-a1B2…"),
    ],
)
def test_the_history_is_looked_at_too(tmp_path: Path, history: str, fault: str) -> None:
    engine = Archive("podman", "/p", "4", history=history)
    assert secret_scan.check(engine, image(plant(tmp_path / "l", HARMLESS), digests=1), {}) == (
        [fault],
        1,
    )


@pytest.mark.parametrize(
    ("history", "names"),
    [
        ("|1 NPM_TOKEN=hunter22 /bin/sh -c npm ci", ["NPM_TOKEN="]),
        ('RUN |2 A=1 b2_application_key="x" /bin/sh -c make # buildkit', ["b2_application_key="]),
        ("ENV DB_PASSWORD=letmein A=1", ["DB_PASSWORD="]),
        (
            'HEALTHCHECK [ -z "$OPENCODE_SERVER_PASSWORD" ] || curl -u x:$TOKEN --max-tokens=5 KEYS=1',
            [],
        ),
        ("RUN export GITHUB_TOKEN=$(cat /t) API_KEY=${KEY} TOKEN= ; login --password-stdin", []),
    ],
)
def test_a_name_that_says_so_is_enough_in_the_history(
    tmp_path: Path, history: str, names: list[str]
) -> None:
    engine = Archive("podman", "/p", "4", history=history)
    faults, _ = secret_scan.check(engine, image(plant(tmp_path / "l", HARMLESS), digests=1), {})
    assert faults == [f"the history holds {name}…" for name in names]


def test_variables_labels_and_commands_are_looked_at_too(tmp_path: Path) -> None:
    config = {
        "Env": ["PATH=/bin", "VALKEY_PASSWORD=x", "DD_API_KEY="],
        "Labels": {"deploy.token": "letmein", "org.opencontainers.image.title": "x"},
        "Entrypoint": ["tini", "--api-key=a"],
        "Cmd": [TOKENS["openai"]],
    }
    subject = image(plant(tmp_path / "l", HARMLESS), digests=1, **config)
    faults, _ = secret_scan.check(Archive("podman", "/p", "4"), subject, {})
    names = ("sk-proj-a1B2", "VALKEY_PASSWORD=", "deploy.token=", "--api-key=")
    assert faults == [f"the configuration holds {name}…" for name in names]
