"""scripts/backup when things go wrong: nothing is lost, and the last good backup still restores."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lib.backup import manifest
from lib.backup.crc64 import crc64
from lib.backup.replication import Master

from tests.backups import NO_DELAY, NODES, SERVER_PASSWORD, World, client, world
from tests.servers import redis_server, until, valkey_server

pytestmark = pytest.mark.server
ONCE = {"RCLONE_RETRIES": "1", "RCLONE_LOW_LEVEL_RETRIES": "2"}
SLOW = (*NO_DELAY, "--rdb-key-save-delay", "4000000")
"""A server that takes 4 s for each key that it sends."""

NOWHERE = {"BACKUP_ADVERTISE": "192.0.2.1:7000"}
"""A target that is told to fetch from there waits until it is told otherwise: no such host exists.
"""


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path) as made:
        yield made


def forge(
    here: World, backup: str, part: str, raw: Callable[[bytes], bytes] = bytes, **facts: Any
) -> None:
    """Have a backup hold something else, as if that had been copied: every hash is right."""
    folder = f"backups/{backup}/"
    body = json.loads(here.b2.objects("bucket")[folder + "manifest.json"])
    said = body["parts"][part]
    data = raw(gzip.decompress(here.b2.objects("bucket")[folder + said["object"]]))
    packed = gzip.compress(data)
    here.b2.tamper("bucket", folder + said["object"], lambda _: packed)
    told = manifest.parse(body)
    sums = [(len(each), hashlib.sha256(each).hexdigest()) for each in (packed, data)]
    parts = {
        **told.parts,
        part: manifest.Part(said["object"], sums[0], sums[1], {**said["facts"], **facts}),
    }
    written = manifest.write(manifest.Backup(told.id, told.kind, told.host, parts))
    here.b2.tamper("bucket", folder + "manifest.json", lambda _: written)


def signed(tmp_path: Path, data: bytes) -> bytes:
    """Return an RDB with the CRC64 that it should have."""
    (tmp_path / "forged").write_bytes(data)
    return data[:-8] + crc64(tmp_path / "forged", len(data) - 8).to_bytes(8, "little")


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def stop_at(here: World, call: str, name: str = "") -> Callable[[], bool]:
    """Let the first such request hang; return what says whether it has come."""
    came: list[str] = []

    def fault(asked: str, of: str) -> str:
        if asked == call and name in of and not came:
            came.append(of)
            return "hang"
        return ""

    here.b2.fault = fault
    return lambda: bool(came)


STEPS = {
    "listing": ("b2_list_file_names", ""),
    "uploading": ("upload", "valkey.rdb.gz"),
    "reading back": ("b2_download_file_by_id", "valkey.rdb.gz"),
    "writing the manifest": ("upload", "manifest.json"),
}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_run_that_is_ended_at_any_step_leaves_the_last_good_one(here: World, number: int) -> None:
    good = here.run("--only", "valkey,files")
    with client(here.valkey) as server:
        server.set("since", "1")
    # SIGTERM runs the same clean-up wherever it comes: two places are enough, and each takes a
    # second.
    for call, name in list(STEPS.values())[:: 1 if number == signal.SIGKILL else 2]:
        came = stop_at(here, call, name)
        child = here.start("run", "--only", "valkey,files")
        until(came)
        child.send_signal(number)
        here.b2.fault = lambda _call, _name: ""
        assert here.end(child).code == (-number if number == signal.SIGKILL else 128 + number)
        assert here.ids() == [good]
        until(lambda: not any(str(here.work).encode() in line for line in commands()))
    during_the_copy(here, number)
    assert here.ids() == [good]
    here.lose()
    here.backup(
        "restore", "--only", "valkey,files"
    ).ok()  # sweeps away what the killed ones have left
    assert {path.name for path in here.work.iterdir()} <= {"lock", "last.json"}
    with client(here.valkey) as server:
        assert server.dbsize() == 56
        assert server.get("since") is None


def during_the_copy(here: World, number: int) -> None:
    """End a run while a server sends its data; the server has its delay again, if later."""
    with (
        valkey_server(*SLOW, "--repl-diskless-sync-delay", "7", password=SERVER_PASSWORD) as slow,
        client(slow) as server,
    ):
        server.set("key", "1")
        words = ("run", "--only", "valkey,files")
        child = here.start(*words, VALKEY_PORT=str(slow))
        until(lambda: server.info("persistence")["rdb_bgsave_in_progress"])
        assert server.config_get("repl-diskless-sync-delay") == {"repl-diskless-sync-delay": "0"}
        child.send_signal(number)
        here.end(child)
        until(lambda: not server.info("replication")["connected_slaves"])
        if number == signal.SIGKILL:
            server.config_set("rdb-key-save-delay", 0)
            until(lambda: not server.info("persistence")["rdb_bgsave_in_progress"])
            there = {"BACKUP_REMOTE": str(here.home / "elsewhere"), "VALKEY_PORT": str(slow)}
            here.run("--only", "valkey", "--create", **there)
        assert server.config_get("repl-diskless-sync-delay") == {"repl-diskless-sync-delay": "7"}


def commands() -> Iterator[bytes]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_bytes()


def test_503s_and_cuts_are_got_over(here: World) -> None:
    seen: Counter[str] = Counter()

    def first_fails(call: str, _name: str) -> str:
        seen[call] += 1
        return (
            {
                "b2_list_file_names": "503",
                "upload": "cut",
                "b2_get_upload_url": "503",
                "b2_download_file_by_id": "cut",
            }.get(call, "")
            if seen[call] == 1
            else ""
        )

    here.b2.fault = first_fails
    here.run("--only", "valkey,files")
    assert seen["upload"] > 3
    seen.clear()

    def first_read_fails(call: str, name: str) -> str:
        seen[name] += 1
        return (
            "cut"
            if call == "b2_download_file_by_id" and "valkey" in name and seen[name] == 1
            else ""
        )

    here.b2.fault = first_read_fails
    here.backup("verify", RCLONE_LOW_LEVEL_RETRIES="1").ok()  # rclone does not try again: we do
    seen.clear()
    here.b2.fault = first_fails
    here.lose()
    here.backup("restore", "--only", "valkey,files").ok()
    assert seen["b2_download_file_by_id"] > 2
    here.b2.fault = lambda _call, name: "slow" if "valkey" in name else ""
    here.run("--only", "valkey", BACKUP_STALL_SECONDS="2")  # slow is not stalled


@pytest.mark.parametrize("fault", ["503", "cut", "hang"])
def test_a_remote_that_stays_away_is_named_and_what_was_there_stays(
    here: World, fault: str
) -> None:
    good = here.run("--only", "files")
    here.b2.fault = lambda call, _name: fault if call == "upload" else ""
    failed = here.backup("run", "--only", "files", BACKUP_STALL_SECONDS="1", **ONCE)
    failed.failed("RemoteUnreachable", "the last good backup is untouched")
    here.b2.fault = lambda _call, _name: ""
    assert [each["id"] for each in here.backup("list", "--json").ok().json] == [good]


def test_a_bucket_that_is_gone_is_not_made_anew_in_silence(here: World) -> None:
    here.run("--only", "files")
    kept = here.b2.buckets.pop("bucket")
    for words in (["run", "--only", "files"], ["list"], ["status"], ["restore", "--only", "files"]):
        here.backup(*words).failed("RemoteGone", "--create")
    assert here.b2.buckets == {}
    here.b2.buckets["bucket"] = kept
    here.backup("restore", "--only", "files", "--replace").ok()


def test_half_a_backup_does_not_count_and_goes_after_a_day(here: World) -> None:
    good = here.run("--only", "files")
    for half in ("29990101T000000Z-aaaaaa", "20200101T000000Z-bbbbbb"):
        here.b2._store("bucket", f"backups/{half}/files.tar.gz", b"half", {})
    here.b2._store("bucket", "backups/somebody/elses", b"file", {})
    faults = {each["id"]: each["fault"] for each in here.backup("list", "--json").ok().json}
    assert faults.pop(good) == ""
    assert set(faults.values()) == {"incomplete: it has no manifest"}
    assert here.backup("restore", "--only", "files", "--replace", "--json").ok().json["id"] == good
    here.backup("restore", "2999", "--only", "files").failed("BackupDamaged", "no manifest")
    assert here.backup("prune", "--json").ok().json == ["20200101T000000Z-bbbbbb"]
    assert "backups/29990101T000000Z-aaaaaa/files.tar.gz" in here.b2.objects("bucket")
    assert "backups/somebody/elses" in here.b2.objects("bucket")


def test_what_was_tampered_with_is_never_restored(here: World) -> None:
    older, newer = (here.run("--only", "valkey,files") for _ in range(2))
    here.lose()
    folder = f"backups/{newer}/"
    name = folder + "valkey.rdb.gz"
    here.b2.tamper("bucket", name, lambda data: flip(data, len(data) // 2))
    here.backup("verify").failed("BackupDamaged", newer)
    here.backup("restore", "--only", "valkey").failed(
        "BackupDamaged", "valkey.rdb.gz is not what was uploaded"
    )
    here.b2.tamper("bucket", name, lambda data: data[:-5])
    listed = {each["id"]: each["fault"] for each in here.backup("list", "--json").ok().json}
    assert listed == {newer: "valkey.rdb.gz has not the size it had", older: ""}
    manifested = here.b2.objects("bucket")[folder + "manifest.json"]
    here.b2.tamper(
        "bucket", folder + "manifest.json", lambda data: data.replace(b'"files": 1', b'"files": 2')
    )
    assert manifested != here.b2.objects("bucket")[folder + "manifest.json"]
    here.backup("restore", newer).failed("BackupDamaged", "manifest was changed")
    stolen = here.b2.objects("bucket")[f"backups/{older}/manifest.json"]
    here.b2.tamper(
        "bucket", folder + "manifest.json", lambda _: stolen
    )  # another one's is not its own
    here.backup("restore", newer).failed("BackupDamaged", "manifest cannot be read")
    with client(here.valkey) as server:
        assert server.dbsize() == 0
    here.backup("restore", "--only", "valkey").ok()
    with client(here.valkey) as server:
        assert server.dbsize() == 56


def test_what_would_end_the_target_is_refused_before_it_is_touched(
    here: World, tmp_path: Path
) -> None:
    backup = here.run("--only", "falkordb,valkey")
    kept = {name: stored[-1].data for name, stored in here.b2.buckets["bucket"].items()}

    def refused(
        name: str, *sentences: str, words: tuple[str, ...] = ("--only", "falkordb")
    ) -> None:
        here.backup("restore", backup, "--replace", *words).failed(name, *sentences)
        assert here.nodes() == NODES  # it lives, and holds what it held
        for path, data in kept.items():
            here.b2.tamper("bucket", path, lambda _, data=data: data)  # type: ignore[misc]

    newer = b"REDIS0099"
    forge(here, backup, "falkordb", lambda data: signed(tmp_path, newer + data[9:]))
    refused("TargetTooOld", "this is RDB 99")
    forge(here, backup, "falkordb", lambda data: flip(data, len(data) // 2))
    refused("CopyCorrupt", "CRC64")
    forge(here, backup, "falkordb", lambda data: data[: len(data) // 2])
    refused("CopyCorrupt", "it was cut")
    forge(here, backup, "falkordb", lambda data: data[:-8] + bytes(8))
    refused("CopyCorrupt", "no checksum")
    forge(here, backup, "falkordb", modules={"graph": 999999})
    refused("TargetTooOld", "module graph")
    with redis_server(password=SERVER_PASSWORD) as plain:
        to = ("--to", f"falkordb=127.0.0.1:{plain}")
        refused("TargetTooOld", "has none of the module graph", words=to)
    to = ("--to", f"falkordb=127.0.0.1:{here.valkey}")
    refused("TargetTooOld", "reads RDB 80, and this is RDB 12", words=to)
    with client(here.falkordb) as server:
        server.config_set("maxmemory", "1mb")
        forge(here, backup, "falkordb", memory=50_000_000)
        here.backup("restore", backup, "--replace", "--only", "falkordb").failed(
            "TargetTooSmall", "maxmemory"
        )
        server.config_set("maxmemory", "0")
    assert not [
        each for each in here.backup("list", "--json").ok().json if each["kind"] == "safety"
    ]


def test_a_replica_and_a_database_in_use_are_left_alone(here: World) -> None:
    here.run("--only", "valkey,opencode")
    with valkey_server(*NO_DELAY, password=SERVER_PASSWORD) as replica, client(replica) as server:
        server.config_set("masterauth", SERVER_PASSWORD)
        server.replicaof("127.0.0.1", here.valkey)
        until(lambda: server.info("replication")["master_link_status"] == "up")
        to = f"valkey=127.0.0.1:{replica}"
        here.backup("restore", "--replace", "--to", to).failed(
            "TargetInUse", "is a replica of 127.0.0.1"
        )
        assert server.info("replication")["role"] == "slave"
    with contextlib.closing(sqlite3.connect(here.database)) as open_elsewhere:
        open_elsewhere.execute("SELECT count(*) FROM session").fetchone()
        here.backup("restore", "--replace", "--only", "opencode").failed(
            "TargetInUse", "Stop the server"
        )
    here.backup("restore", "--replace", "--only", "opencode").ok()


def test_a_damaged_database_is_kept_aside_and_replaced(here: World) -> None:
    here.run("--only", "opencode")
    with here.database.open("r+b") as file:
        file.seek(0)
        file.write(b"nothing that SQLite knows")
    damaged = here.database.read_bytes()
    here.backup("run", "--only", "opencode").failed("CopyCorrupt")
    here.backup("restore", "--only", "opencode").failed("TargetNotEmpty")
    here.backup("restore", "--only", "opencode", "--replace").ok()
    assert here.rows() == 200
    [kept] = [
        path for path in here.auth.parent.glob("opencode.db.damaged-*") if path.name.endswith("Z")
    ]
    assert kept.read_bytes() == damaged


def test_a_restore_that_does_not_compare_puts_everything_back(here: World) -> None:
    backup = here.run()
    contents = here.backup("list", "--json").ok().json[0]["parts"]["valkey"]["facts"]["contents"]
    contents["databases"]["0"]["sample"]["key7"] = "string:0"
    forge(here, backup, "valkey", contents=contents)
    here.graph("CREATE (:Node {late: 1})")
    with client(here.valkey) as server:
        server.set("late", "1")
    here.auth.write_text("newer")
    failed = here.backup("restore", "--replace")
    failed.failed("RestoreFailed", "databases 0", "as it was before")
    assert here.nodes() == NODES + 1  # it had been restored already, and was put back
    with client(here.valkey) as server:
        assert server.get("late") == b"1"
        assert server.info("replication")["role"] == "master"
    assert here.auth.read_text() == "newer"
    here.lose()
    here.backup("restore").failed("RestoreFailed")
    with client(here.valkey) as server:
        assert server.dbsize() == 0  # it was empty, and is again


def test_data_that_no_check_sees_through_ends_no_restore_without_the_safety_copy(
    here: World, tmp_path: Path
) -> None:
    backup = here.run("--only", "valkey")
    # A type that nobody knows, with a right CRC64: what no check before can see.
    forge(
        here,
        backup,
        "valkey",
        lambda data: signed(tmp_path, data[:-9] + b"\xfe\x07\x63\x01k\x01v" + data[-9:]),
    )
    to = "valkey=127.0.0.1:{}".format
    words = ("restore", backup, "--replace", "--to")
    with valkey_server(*NO_DELAY, password=SERVER_PASSWORD) as other, client(other) as server:
        server.set("precious", "1")
        here.backup(*words, to(other)).failed("RestoreFailed", "was sent the data 3 times")
        assert server.keys() == [b"precious"]
        assert server.info("replication")["role"] == "master"
    with redis_server(*NO_DELAY, password=SERVER_PASSWORD) as other, client(other) as server:
        server.set("precious", "1")
        failed = here.backup(*words, to(other))  # Redis ends itself
        failed.failed("SafetyCopyNeeded", "ended while it loaded")
        safety = failed.stderr.rsplit("backup restore ", 1)[1].split()[0]
    with redis_server(*NO_DELAY, password=SERVER_PASSWORD) as again, client(again) as server:
        here.backup("restore", safety, "--to", to(again)).ok()
        assert server.get("precious") == b"1"


def test_a_target_that_cannot_reach_us_is_a_master_again(here: World) -> None:
    here.run("--only", "valkey")
    limits = {"BACKUP_STALL_SECONDS": "BACKUP_ADVERTISE", "BACKUP_RESTORE_SECONDS": "BACKUP_RESTOR"}
    for limit, named in limits.items():
        env = {limit: "1", **NOWHERE}
        failed = here.backup("restore", "--replace", "--only", "valkey", **env)
        failed.failed("RestoreFailed", named, "as it was before")
    here.whole()


def test_a_target_that_cannot_load_the_data_is_left_as_it_was(here: World, tmp_path: Path) -> None:
    here.run("--only", "valkey")
    gone = tmp_path / "gone"
    gone.mkdir()
    options = (*NO_DELAY, "--dir", str(gone))
    with valkey_server(*options, password=SERVER_PASSWORD) as port, client(port) as server:
        server.set("precious", "1")
        gone.rmdir()  # for root, too, a replica cannot open its temporary file there
        words = ("restore", "--replace", "--to", f"valkey=127.0.0.1:{port}")
        failed = here.backup(*words).failed("RestoreFailed", "3 times", "can write to")
        assert "the target is as it was" in failed.stderr
        child = here.start(*words)
        until(lambda: server.info("replication")["role"] == "slave")
        child.send_signal(signal.SIGTERM)
        done = here.end(child)
        assert done.code == 128 + signal.SIGTERM, done.stderr
        assert server.info("replication")["role"] == "master"
        assert server.config_get("masteruser") == {"masteruser": ""}
        assert server.keys() == [b"precious"]


def _sync(server: Any, what: str) -> int:
    """Return what a replica says of its synchronisation; 0 where there is none."""
    return int(server.info("replication").get(f"master_sync_{what}", 0))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_restore_that_is_interrupted_loses_nothing(here: World, number: int) -> None:
    with client(here.valkey) as server:
        for i in range(24):
            server.set(f"big{i}", os.urandom(1 << 20))
        here.run("--only", "valkey", RCLONE_B2_UPLOAD_CUTOFF="5M", RCLONE_B2_CHUNK_SIZE="5M")
        assert "b2_finish_large_file" in here.b2.requests  # so much goes up in parts
        left = 0
        for _ in range(10):  # until it is caught in the middle
            server.flushall()
            server.set("precious", "1")
            child = here.start("restore", "--replace", "--only", "valkey")
            until(lambda child=child: _sync(server, "in_progress") or child.poll() is not None)  # type: ignore[misc]
            child.send_signal(signal.SIGSTOP)
            # Megabytes may still be on their way through the kernel: enough, perhaps, to be
            # complete.
            until(
                lambda: not _sync(server, "in_progress") or _sync(server, "last_io_seconds_ago") > 0
            )
            if left := _sync(server, "left_bytes"):
                break
            child.send_signal(signal.SIGCONT)
            here.end(child).ok()
        assert left > 0
        child.send_signal(number)
        child.send_signal(signal.SIGCONT)
        done = here.end(child)
        if number == signal.SIGTERM:
            assert done.code == 128 + number
            assert server.config_get("masteruser") == {"masteruser": ""}
        assert server.get("precious") == b"1"
        here.backup(
            "restore", "--replace", "--only", "valkey"
        ).ok()  # frees what the killed one has left a replica
        assert server.dbsize() == 80
        assert server.info("replication")["role"] == "master"


def test_nobody_else_is_sent_the_data_while_a_restore_offers_it(tmp_path: Path) -> None:
    (tmp_path / "rdb").write_bytes(b"precious")
    master = Master(tmp_path / "rdb", "127.0.0.1", 0)
    try:
        for said in (
            b"PSYNC ? -1\r\n",
            f"AUTH {master.user} guess\r\nPSYNC ? -1\r\n".encode(),
            b"*1\r\n$4\r\nSYNC\r\n",
        ):
            with socket.create_connection(("127.0.0.1", master.port), 10) as stranger:
                stranger.sendall(said)
                heard = stranger.recv(4096) + stranger.recv(4096)  # it is sent away
                assert heard in (b"", b"-WRONGPASS no\r\n")
        with socket.create_connection(("127.0.0.1", master.port), 10) as known:
            known.sendall(f"AUTH {master.user} {master.password}\r\nPSYNC ? -1\r\n".encode())
            with known.makefile("rb") as lines:
                assert lines.readline() == b"+OK\r\n"
                assert lines.readline().startswith(b"+FULLRESYNC ")
                assert (lines.readline(), lines.read(8)) == (b"$8\r\n", b"precious")
    finally:
        master.close()
    assert master.sent == 8


def test_a_server_that_goes_away_or_stalls_is_named(here: World) -> None:
    good = here.run("--only", "valkey")
    # One that refuses CONFIG is waited for.
    slow = ("--repl-diskless-sync-delay", "600", "--rename-command", "CONFIG", "")
    with valkey_server(*slow, password=SERVER_PASSWORD) as stalled, client(stalled) as server:
        env = {"VALKEY_PORT": str(stalled), "BACKUP_STALL_SECONDS": "1"}
        here.backup("run", "--only", "valkey", **env).failed("CopyCut", "it stalled")
        child = here.start("run", "--only", "valkey", VALKEY_PORT=str(stalled))
        until(lambda: server.info("replication")["connected_slaves"])
    here.end(child).failed("CopyCut")
    here.backup("run", "--only", "valkey", VALKEY_PASSWORD=SERVER_PASSWORD[:-1]).failed(
        "ServerUnreachable", "rejects VALKEY_PASSWORD"
    )
    here.backup("run", "--only", "opencode", HOME=str(here.home / "none")).failed("NothingToCopy")
    assert [each["id"] for each in here.backup("list", "--json").ok().json] == [good]


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A disk of 300 kB."""
    disk = tmp_path / "tiny"
    disk.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k,mode=700", "tmpfs", str(disk)], check=True
    )
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_named_and_left_as_it_was(here: World, tiny: Path) -> None:
    with client(here.valkey) as server:
        server.set("big", os.urandom(1 << 20))
    (here.auth.parent / "storage").write_bytes(os.urandom(1 << 20))
    here.environ |= ONCE
    good = here.run("--only", "valkey,opencode,files")
    work = {"BACKUP_WORK_DIR": str(tiny / "work")}
    here.backup("run", "--only", "valkey", **work).failed("DiskFull", str(tiny))
    here.backup("run", "--only", "files", **work).failed("DiskFull", str(tiny))
    here.backup("restore", "--replace", "--only", "valkey", **work).failed("DiskFull")
    assert {path.name for path in (tiny / "work").iterdir()} == {"lock", "last.json"}
    with client(here.valkey) as server:
        assert server.dbsize() == 57
    here.backup("restore", "--to", f"opencode={tiny / 'db'}").ok()
    here.backup("restore", "--to", f"files={tiny / 'files'}").failed(
        "RestoreFailed", "No space left"
    )
    assert not [path for path in (tiny / "files").rglob("*") if path.is_file()]
    assert here.ids() == [good]


def test_one_at_a_time(here: World) -> None:
    came = stop_at(here, "upload")
    child = here.start("run", "--only", "files")
    until(came)
    done = subprocess.run(
        child.args,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], "HOME": str(here.home), **here.environ},
    )
    assert done.returncode == 12
    assert "Busy: another backup or restore works in" in done.stderr
    here.b2.fault = lambda _call, _name: ""
    child.send_signal(signal.SIGTERM)
    here.end(child)
