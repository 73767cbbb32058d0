"""scripts/backup against real FalkorDB, Valkey, SQLite and rclone, and a fake B2 that Backblaze's
client reads too.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from b2sdk.v2 import B2Api, InMemoryAccountInfo

from bench.backup import drill
from tests.backups import (
    DATADOG,
    ENCRYPTION,
    NO_DELAY,
    NODES,
    SERVER_PASSWORD,
    World,
    client,
    repeatedly,
    world,
)
from tests.fake_b2 import ACCOUNT, KEY
from tests.servers import collector, free_port, redis_server, until, valkey_server

pytestmark = pytest.mark.server


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path) as made:
        yield made


def test_everything_comes_back_after_everything_is_lost(here: World) -> None:
    backup = here.run()
    here.lose()
    done = here.backup("restore", "--json").ok().json
    assert done["id"] == backup
    assert done["safety"] == ""  # there was nothing to save
    here.whole()


def test_what_is_at_b2_is_what_the_manifest_says(here: World) -> None:
    backup = here.run()
    api = B2Api(InMemoryAccountInfo())
    api.authorize_account(here.b2.url, ACCOUNT, KEY)
    bucket = api.get_bucket_by_name("bucket")
    found = {}
    for version, _ in bucket.ls(f"backups/{backup}", recursive=True):
        into = io.BytesIO()
        bucket.download_file_by_name(version.file_name).save(into)
        found[version.file_name.split("/")[-1]] = into.getvalue()
    manifest = json.loads(found.pop("manifest.json"))
    assert sorted(found) == ["falkordb.rdb.gz", "files.tar.gz", "opencode.db.gz", "valkey.rdb.gz"]
    for part in manifest["parts"].values():
        data = found[part["object"]]
        assert part["stored"] == [len(data), hashlib.sha256(data).hexdigest()]
        raw = gzip.decompress(data)
        assert part["raw"] == [len(raw), hashlib.sha256(raw).hexdigest()]
    graph = manifest["parts"]["falkordb"]["facts"]["contents"]["graphs"]["memory"]
    assert (graph["nodes"], graph["edges"], graph["indexes"]) == (2 * NODES, NODES, 1)
    assert manifest["parts"]["opencode"]["facts"]["rows"]["session"] == 200
    # The manifest is the last thing that is written, so that there is none beside half a backup.
    uploads = [request for request in here.b2.requests if request.startswith("upload ")]
    assert uploads[-1].endswith("/manifest.json")
    assert here.b2.refusals.count("bad_request") == 0


def test_with_a_password_nothing_is_readable_and_all_is_restored(here: World) -> None:
    here.environ["BACKUP_PASSWORD"] = ENCRYPTION
    here.run()
    stored = b"".join(here.b2.objects("bucket").values())
    assert stored
    assert b"provider" not in stored
    assert b"sha256" not in stored
    here.backup("verify").ok()
    here.lose()
    here.backup("restore").ok()
    here.whole()


def test_a_wrong_password_or_none_is_named_by_every_command(here: World) -> None:
    here.run(BACKUP_PASSWORD=ENCRYPTION)
    before = here.b2.objects("bucket")
    for words in (["run"], ["restore", "--replace"]):
        here.backup(*words, BACKUP_PASSWORD=ENCRYPTION[:-1]).failed("WrongPassword")
        here.backup(*words).failed("WrongPassword")
    assert here.b2.objects("bucket") == before
    here.whole()


def test_secrets_come_from_mounted_files_too(here: World, tmp_path: Path) -> None:
    for name, secret in {"RCLONE_CONFIG_B2_KEY": KEY, "VALKEY_PASSWORD": SERVER_PASSWORD}.items():
        (tmp_path / name).write_text(secret + "\n")
        del here.environ[name]
        here.environ[f"{name}_FILE"] = str(tmp_path / name)
    (tmp_path / "password").write_text(ENCRYPTION)
    here.run(BACKUP_PASSWORD_FILE=str(tmp_path / "password"))
    assert len(here.backup("list", "--json", BACKUP_PASSWORD=ENCRYPTION).ok().json) == 1


def test_no_process_ever_shows_a_secret_and_no_file_holds_one(here: World) -> None:
    seen: set[str] = set()

    def look() -> None:
        for process in Path("/proc").iterdir():  # a glob of them fails over one that has just ended
            with contextlib.suppress(OSError):
                seen.add((process / "cmdline").read_bytes().decode(errors="replace"))
        with contextlib.suppress(OSError):  # it comes and goes
            for path in here.work.rglob("*"):
                if path.is_file() and path.stat().st_size < 1 << 20:
                    held = path.read_bytes()
                    assert not any(
                        secret.encode() in held for secret in (SERVER_PASSWORD, ENCRYPTION, KEY)
                    ), path

    with repeatedly(look):
        here.run(BACKUP_PASSWORD=ENCRYPTION)
    assert any("rclone" in line and "hashsum" in line for line in seen)
    for secret in (SERVER_PASSWORD, ENCRYPTION, KEY):
        assert not any(secret in line for line in seen)


def test_the_database_is_copied_whole_while_it_is_written_to(here: World) -> None:
    with contextlib.closing(sqlite3.connect(here.database, check_same_thread=False)) as writer:
        writer.execute(
            "PRAGMA wal_autocheckpoint = 0"
        )  # what is written stays beside the file, as it may

        def write() -> None:
            with writer:  # always two at once: a copy with an odd number is torn
                writer.executemany("INSERT INTO session (data) VALUES (?)", [("w" * 5000,)] * 2)

        with repeatedly(write):
            until(lambda: here.rows() > 220)
            here.run("--only", "opencode")
    target = here.home / "restored"
    here.backup("restore", "--to", f"opencode={target}").ok()
    with contextlib.closing(sqlite3.connect(target / "opencode.db")) as restored:
        assert restored.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        count = restored.execute("SELECT count(*) FROM session").fetchone()[0]
    assert 220 < count <= here.rows()
    assert count % 2 == 0


def test_servers_are_copied_while_they_are_written_to(here: World) -> None:
    def link() -> None:
        here.graph(
            "CREATE (:Node)-[:Knows]->(:Node)"
        )  # one transaction: never one without the other

    def push() -> None:
        with client(here.valkey) as server:
            server.rpush("log", "x")

    with (
        repeatedly(link),
        repeatedly(push),
    ):  # a thread for each: one that waits must not hold up the other
        backup = here.run("--only", "falkordb,valkey")
    facts = next(each for each in here.backup("list", "--json").ok().json if each["id"] == backup)[
        "parts"
    ]
    assert facts["valkey"]["facts"]["exact"] is False
    with redis_server(*NO_DELAY, graph=True, password=SERVER_PASSWORD) as falkordb:
        to = ["--to", f"falkordb=127.0.0.1:{falkordb}"]
        here.backup("restore", "--only", "falkordb", *to).ok()
        nodes, edges = (
            here.graph(query, port=falkordb)[0][0]
            for query in ("MATCH (n) RETURN count(n)", "MATCH ()-[e]->() RETURN count(e)")
        )
    assert nodes == 2 * edges


def test_a_target_that_holds_something_needs_replace_and_is_saved_first(here: World) -> None:
    backup = here.run()
    here.graph("CREATE (:Node {late: 1})")
    with client(here.valkey) as server:
        server.set("late", "1")
    here.backup("restore").failed("TargetNotEmpty", "falkordb at", "valkey at", "opencode.db")
    assert here.nodes() == NODES + 1
    dry = here.backup("restore", "--replace", "--dry-run", "--json").ok().json
    assert dry["replaces"] == ["falkordb", "valkey", "opencode"]
    assert here.nodes() == NODES + 1
    safety = here.backup("restore", "--replace", "--json").ok().json["safety"]
    here.whole()
    # What was replaced is a backup of its own; the newest one is still the one that was made on
    # purpose.
    assert here.backup("restore", "--replace", "--dry-run", "--json").ok().json["id"] == backup
    here.backup("restore", safety, "--replace", "--only", "falkordb,valkey").ok()
    assert here.nodes() == NODES + 1
    with client(here.valkey) as server:
        assert server.get("late") == b"1"


def test_any_remote_of_rclones_will_do(here: World, tmp_path: Path) -> None:
    env = {"BACKUP_REMOTE": str(tmp_path / "disk")}
    here.backup("run", "--only", "files", **env).failed("RemoteGone", "--create")
    here.run("--only", "files", "--create", **env)
    env = {
        "BACKUP_REMOTE": "mine:a/b",
        "RCLONE_CONFIG_MINE_TYPE": "alias",
        "RCLONE_CONFIG_MINE_REMOTE": str(tmp_path),
    }
    here.run("--only", "files", "--create", **env)
    assert len(here.backup("list", "--json", **env).ok().json) == 1


def test_valkey_9_restores_into_redis_unless_a_field_of_a_hash_expires(here: World) -> None:
    env = {"VALKEY_PORT": str(here.valkey)}
    here.run("--only", "valkey", **env)
    with redis_server(*NO_DELAY, password=SERVER_PASSWORD) as port, client(port) as server:
        here.backup("restore", "--to", f"valkey=127.0.0.1:{port}").ok()
        assert server.dbsize() == 56
        assert server.get("key49") == b"x" * 49
    with client(here.valkey) as server:
        server.execute_command("HEXPIRE", "hash", 3600, "FIELDS", 1, "f7")
    here.run("--only", "valkey", **env)
    with redis_server(*NO_DELAY, password=SERVER_PASSWORD) as port:
        to = ("--to", f"valkey=127.0.0.1:{port}")
        here.backup("restore", *to).failed("TargetTooOld", "this is RDB 80")
    with valkey_server(*NO_DELAY, password=SERVER_PASSWORD) as port, client(port) as server:
        here.backup("restore", "--to", f"valkey=127.0.0.1:{port}").ok()
        assert server.dbsize() == 56
        [left] = server.execute_command("HTTL", "hash", "FIELDS", 1, "f7")
        assert 0 < left <= 3600


def test_status_says_late_and_failing_by_its_exit_code(here: World) -> None:
    here.environ["BACKUP_PARTS"] = "valkey files"
    here.backup("status").failed("Late", "valkey, files")
    here.run("--only", "valkey")
    here.backup("status").failed("Late", "or not there: files")
    here.run()
    said = here.backup("status").ok().stdout
    assert [line.split()[:2] for line in said.splitlines()] == [["valkey", "ok"], ["files", "ok"]]
    here.backup("status", BACKUP_MAX_AGE_HOURS="0").failed("Late")
    here.backup("run", VALKEY_PORT=str(free_port())).failed("ServerUnreachable", "valkey at")
    here.backup("status").failed("LastRunFailed", "ServerUnreachable")


def test_the_drill_loses_everything_and_has_it_back(capsys: pytest.CaptureFixture[str]) -> None:
    took = drill(100)
    assert set(took) == {"backup", "loss", "restore", "compare"}
    assert "200 nodes, 100 keys, 100 rows: all of it" in capsys.readouterr().out


def test_datadog_is_told_of_success_size_and_age(here: World) -> None:
    with collector() as (port, sent):
        env = {
            "DD_API_KEY": DATADOG,
            "DD_URL": f"http://127.0.0.1:{port}",
            "DD_HOSTNAME": "backup-host",
        }
        here.run(**env)  # all parts, so that there is an age
        here.backup("run", RCLONE_CONFIG_B2_KEY="wrong", **env).failed("RemoteRefused")
        here.backup("status", **env).failed("LastRunFailed")
    assert {path for path, _, _ in sent} == {"/api/v2/series"}
    told = [json.loads(body)["series"] for _, _, body in sent]
    values = [
        {
            each["metric"].removeprefix("opencode.backup."): each["points"][0]["value"]
            for each in series
        }
        for series in told
    ]
    assert [each["success"] for each in values] == [1, 0, 0]
    assert values[0]["bytes"] > 1000
    assert 0 <= values[2]["age_seconds"] < 600
    for (_, headers, _), series in zip(sent, told, strict=True):
        assert {name.lower(): value for name, value in headers.items()}["dd-api-key"] == DATADOG
        for each in series:
            assert each["resources"] == [{"type": "host", "name": "backup-host"}]
            assert each["type"] == 3


def test_a_datadog_that_refuses_or_is_away_costs_nothing_but_a_line(here: World) -> None:
    with collector(403) as (port, _):
        env = {"DD_API_KEY": DATADOG, "DD_URL": f"http://127.0.0.1:{port}"}
        assert (
            "datadog: the metrics were not taken"
            in here.backup("run", "--only", "files", **env).ok().stderr
        )
    assert (
        "datadog: the metrics were not taken"
        in here.backup("run", "--only", "files", **env).ok().stderr
    )


def test_prune_keeps_what_it_should_and_reads_back_the_newest_first(here: World) -> None:
    ids = [here.run("--only", "files") for _ in range(3)]
    keep = {f"BACKUP_KEEP_{name}": "0" for name in ("DAILY", "WEEKLY", "MONTHLY")} | {
        "BACKUP_KEEP_LAST": "2"
    }
    assert here.backup("prune", "--dry-run", "--json", **keep).ok().json == [ids[0]]
    assert len(here.ids()) == 3
    assert here.backup("prune", "--json", **keep).ok().json == [ids[0]]
    assert here.ids() == ids[:0:-1]
    keep["BACKUP_KEEP_LAST"] = "0"
    # What Object Lock protects stays, and fails no backup.
    here.b2.fault = lambda call, _name: "file_lock" if call == "b2_delete_file_version" else ""
    done = here.backup("run", "--only", "files", "--prune", "--json", **keep).ok()
    assert "prune failed" in done.stderr
    assert "retention period" in done.stderr
    here.b2.fault = lambda _call, _name: "storage_cap_exceeded"
    here.backup("run", "--only", "files").failed("RemoteRefused", "A cap of the account")
    here.b2.fault = lambda _call, _name: ""
    assert here.backup("prune", "--json", **keep, BACKUP_STACK="staging").ok().json == []
    assert "of the stack opencode" in here.backup("list", BACKUP_STACK="staging").ok().stdout
    two = keep | {"BACKUP_KEEP_LAST": "2"}
    assert here.backup("prune", "--json", **two).ok().json == [ids[1]]
    ids = [ids[0], ids[2], done.json["id"]]
    newest = f"backups/{ids[2]}/files.tar.gz"
    here.b2.tamper("bucket", newest, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    here.backup("prune", **keep).failed("BackupDamaged", ids[2], "Nothing was removed")
    assert len(here.ids()) == 2
    here.b2.tamper("bucket", newest, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    assert here.backup("prune", "--json", **keep).ok().json == [
        ids[1]
    ]  # the last good one stays, whatever is set
    assert here.ids() == [ids[2]]
    assert not [
        name
        for name in here.b2.buckets["bucket"]
        if ids[1] in name and here.b2.buckets["bucket"][name]
    ]
