"""What of scripts/backup needs no server: checksums, what is kept, what the environment may say,
the schedule.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event, Thread

import pytest
from lib.backup import crc64, errors, manifest, remote, retention, schedule, settings, targets
from lib.backup.manifest import INCOMPLETE, Backup, Part
from lib.backup.settings import Keep

from tests.servers import until

B2 = {"BACKUP_REMOTE": "b2:bucket/path", "RCLONE_CONFIG_B2_TYPE": "b2"}


def slowly(data: bytes) -> int:
    """The CRC64 as its definition has it, bit by bit."""
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x95AC9329AC4BC9B5 if crc & 1 else crc >> 1
    return crc


@pytest.mark.parametrize("size", [1, 7, 8, 9, 5000, (1 << 17) - 1, (1 << 17) + 9])
def test_crc64_is_that_of_its_definition(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert slowly(b"123456789") == 0xE9C6D914C4B8D9CA  # as Redis' own sources say
    monkeypatch.setattr(crc64, "BLOCK", 1 << 17)
    path = tmp_path / "data"
    path.write_bytes(data := random.Random(size).randbytes(size))  # noqa: S311
    assert crc64.crc64(path, size) == slowly(data)
    assert crc64.crc64(path, size - 1) == slowly(data[:-1])


def made(days: float, parts: str = "files", kind: str = "backup", fault: str = "") -> Backup:
    when = datetime(2026, 11, 24, 3, tzinfo=UTC) - timedelta(days=days)
    part = Part("o", (1, ""), (1, ""), {})
    return Backup(
        f"{when:%Y%m%dT%H%M%SZ}-{int(days):06x}",
        kind,
        "",
        dict.fromkeys(parts.split(), part),
        1,
        fault,
    )


def test_prune_keeps_the_last_and_the_newest_of_each_day_week_and_month() -> None:
    backups = [made(hours / 24) for hours in range(0, 24 * 120, 12)]
    limits = Keep(last=3, daily=4, weekly=3, monthly=3, safety=0)
    removed = retention.to_remove(backups, limits)
    kept = [backup.id[:11] for backup in backups if backup not in removed]
    assert kept == [
        "20261124T03",
        "20261123T15",
        "20261123T03",  # the last three
        "20261122T15",
        "20261121T15",  # days
        "20261115T15",  # weeks: those of the 23rd and the 22nd are there
        "20261031T15",
        "20260930T15",  # months
    ]
    assert removed == sorted(removed, key=lambda backup: backup.id)


def test_prune_never_removes_the_last_good_copy_of_a_part_nor_what_may_still_be_saved() -> None:
    none = Keep(**dict.fromkeys(Keep.model_fields, 0))
    old = made(500, "valkey opencode")
    half, damaged = (
        made(3, "", "", INCOMPLETE),
        made(2, fault="files.tar.gz has not the size it had"),
    )
    safety = made(4, kind="safety")
    backups = [made(1), made(5), old, made(600, "valkey"), half, damaged, safety]
    assert {backup.id for backup in retention.to_remove(backups, none)} == {
        made(5).id,
        made(600).id,
        half.id,
        safety.id,
    }


def test_what_another_stack_made_or_a_wrong_clock_does_not_count() -> None:
    none = Keep(**dict.fromkeys(Keep.model_fields, 0))
    own, other = made(1), replace(made(0.5), note="of the stack staging")
    assert manifest.choose([other, own], "latest", ["files"]) == own
    assert manifest.choose([other, own], other.id) == other  # named
    assert retention.newest_of_each_part([other, own]) == {"files": own}
    assert retention.to_remove([other, own, made(2)], none) == [made(2)]
    assert manifest.note(replace(own, stack="staging"), "opencode") == "of the stack staging"
    assert manifest.note(own, "opencode") == ""
    assert manifest.note(replace(own, id="20990101T000000Z-aaaaaa"), "") == "from the future"


@pytest.mark.parametrize(
    ("message", "name", "remedy"),
    [
        ("(403 storage_cap_exceeded) Cannot upload files, storage cap exceeded", "Refused", "cap"),
        ('you must use bucket "other" with this application key', "Refused", "that bucket only"),
        ("bucket that application key is restricted to no longer exists", "Gone", "deleted"),
        ("403 access_denied: file is protected by Object Lock", "Refused", "retention period"),
        ("(401 unauthorized) wrong key", "Refused", "RCLONE_CONFIG_"),
        ("dial tcp: connection refused", "Unreachable", "network"),
    ],
)
def test_each_answer_of_b2_has_its_name(message: str, name: str, remedy: str) -> None:
    failure = remote.Remote(settings.load(B2))._failure("listing", message.encode())
    assert type(failure).__name__ == f"Remote{name}"
    assert remedy in failure.remedy


def test_secrets_are_read_from_files_and_only_those_of_secrets(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("hidden-key\n")
    config = settings.load({**B2, "RCLONE_CONFIG_B2_KEY_FILE": str(tmp_path / "key")})
    assert config.environ["RCLONE_CONFIG_B2_KEY"] == "hidden-key"
    assert "RCLONE_CONFIG_B2_KEY_FILE" not in config.environ
    assert config.hide("failed with hidden-key") == "failed with ***"
    assert "hidden-key" not in repr(config)
    sftp = {"RCLONE_CONFIG_S_TYPE": "sftp", "RCLONE_CONFIG_S_KEY_FILE": "/root/.ssh/id"}
    assert (
        settings.load(sftp).environ["RCLONE_CONFIG_S_KEY_FILE"] == "/root/.ssh/id"
    )  # that is rclone's own
    for environ in (
        {"DD_API_KEY": "a", "DD_API_KEY_FILE": str(tmp_path / "key")},
        {"DD_API_KEY_FILE": "/none"},
    ):
        with pytest.raises(errors.NotConfigured):
            settings.load(environ)


def test_a_variable_that_has_the_name_of_a_field_is_ignored() -> None:
    names = ("SERVERS", "KEEP", "SECRETS", "ENVIRON", "DATADOG", "DATABASE")
    assert settings.load({**B2, **dict.fromkeys(names, "x")}) == settings.load(B2)


def test_only_what_rclone_needs_is_handed_on() -> None:
    handed = settings.load(
        {**B2, "DD_API_KEY": "k", "FALKORDB_PASSWORD": "p", "AWS_CA_BUNDLE": "/ca", "PATH": "/bin"}
    )
    assert set(handed.environ) == {"PATH", "RCLONE_CONFIG_B2_TYPE"}


@pytest.mark.parametrize(
    "environ",
    [
        {"BACKUP_REMOTE": "bucket"},
        {"BACKUP_REMOTE": "b2:bucket"},  # nothing describes it
        {"BACKUP_REMOTE": ":b2,account=a,key=k:bucket"},  # would show the key in ps
        {"BACKUP_REMOTE": "b2,key=k:bucket", "RCLONE_CONFIG_B2_TYPE": "b2"},
        {"BACKUP_REMOTE": "c:", "RCLONE_CONFIG_C_TYPE": "crypt"},  # names would be encrypted
        {**B2, "BACKUP_PARTS": "falkordb mysql"},
        {**B2, "BACKUP_KEEP_LAST": "-1"},
        {**B2, "BACKUP_PASSWORD": "first\nsecond"},
        {**B2, "BACKUP_MAX_AGE_HOURS": "day"},
        {**B2, "FALKORDB_PORT": "tcp://10.0.0.1:6379"},
    ],
)
def test_what_cannot_be_meant_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(errors.NotConfigured):
        settings.load(environ)


def test_the_schedule_names_the_next_job() -> None:
    evening = datetime(2026, 11, 25, 20, 30)  # noqa: DTZ001
    assert schedule.next_job("23 3 * * *", evening) == (
        evening.replace(hour=21, minute=17),
        ["status"],
    )
    night = datetime(2026, 11, 26, 3, 18)  # noqa: DTZ001
    assert schedule.next_job("23 3 * * *", night) == (night.replace(minute=23), ["run", "--prune"])
    assert schedule.next_job("@weekly", night)[1] == ["status"]


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "3 * * *",
        "* * * * * rm",
        "* * * * *\n* * * * * x",
        "@reboot",
        "61 3 * * *",
        "* * * * * *",
    ],
)
def test_a_schedule_that_is_not_one_is_refused(bad: str) -> None:
    with pytest.raises(errors.NotConfigured, match="BACKUP_SCHEDULE"):
        schedule.check(bad)


def test_a_job_is_ended_when_the_schedule_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "backup"
    program.write_text(
        "import os, pathlib, sys, time\npathlib.Path(sys.argv[1]).touch()\ntime.sleep(60)"
    )
    monkeypatch.setattr(schedule, "PROGRAM", program)
    stop = Event()
    job = Thread(target=schedule.run_job, args=([str(tmp_path / "started")], stop))
    job.start()
    until((tmp_path / "started").exists, "the job starts")
    stop.set()
    job.join(10)
    assert not job.is_alive()


def test_valkey_reads_its_own_rdbs_and_those_from_before_it_was() -> None:
    redis8, valkey8, valkey9 = 12, 11, 80
    pairs = [(valkey8, redis8), (valkey8, valkey9), (redis8, redis8), (valkey9, valkey9)]
    assert all(targets.readable(version, reads) for version, reads in pairs)
    pairs = [(redis8, valkey8), (redis8, valkey9), (valkey9, redis8)]
    assert not any(targets.readable(version, reads) for version, reads in pairs)


def test_a_manifest_that_was_changed_is_noticed() -> None:
    import json

    written = json.loads(manifest.write(made(1)))
    assert manifest.parse(written) == made(1)
    assert manifest.parse({**written, "host": "another"}).fault == "its manifest was changed"
    body = {name: value for name, value in written.items() if name != "sha256"} | {"format": 2}
    assert "another version" in manifest.parse({**body, "sha256": manifest.checksum(body)}).fault


def test_docs_have_every_exit_code() -> None:
    page = (Path(__file__).parents[2] / "docs/backup.md").read_text()
    rows = {
        (int(code), name, what)
        for code, name, what in re.findall(r"\| (\d+) \| `(\w+)` \| (.+) \|", page)
    }
    kinds = errors.Failure.__subclasses__()
    assert rows == {(kind.code, kind.__name__, str(kind.__doc__)) for kind in kinds}
    assert len({kind.code for kind in kinds}) == len(kinds)
