"""The command line of ``backup``."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from backup_lib import children, manifest, settings
from backup_lib.errors import Failure, Interrupted, full_disk, is_full
from backup_lib.manifest import Backup
from backup_lib.remote import Remote
from backup_lib.say import age, say, size
from backup_lib.settings import Settings

EPILOG = """\
parts:      falkordb, valkey, opencode (its database), files (its auth.json, configuration and state)
exit code:  0 done; 64 the command line is wrong; 130, 143 a signal; each failure has its own: docs/backup.md
Everything is configured by the environment: BACKUP_REMOTE with RCLONE_CONFIG_*, and what docs/backup.md names."""


def run(options: argparse.Namespace, config: Settings) -> Any:
    """Copy, check, upload, read back."""
    from backup_lib import report
    from backup_lib import run as running
    from backup_lib import verify as verifying

    made = None
    try:
        made = running.backup(config, options.only or config.parts, create=options.create, dry_run=options.dry_run)
    finally:
        if not options.dry_run:
            report.send(config, made)
    if made and options.prune:
        verifying.prune(config, read_back=made.id)
    return asdict(made) if made else {}


def listing(options: argparse.Namespace, config: Settings) -> Any:
    """Say which backups there are, those that do not count among them."""
    found = manifest.catalog(Remote(config))
    if not options.json:
        for backup in found or ():
            print(_line(backup))
        if not found:
            print("there are none")
    return [asdict(backup) | {"age_seconds": round(backup.age_seconds)} for backup in found]


def _line(backup: Backup) -> str:
    state = backup.fault or "complete"
    parts = " ".join(backup.parts)
    return f"{backup.id}  {age(backup.age_seconds):>7}  {size(backup.size):>8}  {backup.kind:6}  {parts}  {state}"


def verify(options: argparse.Namespace, config: Settings) -> Any:
    """Read a whole backup and compare each object with its manifest."""
    from backup_lib import verify as verifying

    checked = verifying.verify(config, options.id, everything=options.all)
    return [backup.id for backup in checked]


def prune(options: argparse.Namespace, config: Settings) -> Any:
    """Remove what the BACKUP_KEEP_* variables do not keep, once the newest backup has been read back."""
    from backup_lib import verify as verifying

    return [backup.id for backup in verifying.prune(config, dry_run=options.dry_run)]


def restore(options: argparse.Namespace, config: Settings) -> Any:
    """Look, take a safety copy, restore, compare."""
    from backup_lib import restore as restoring

    request = restoring.Request(options.id, tuple(options.only or ()), options.to, options.replace, options.dry_run)
    return restoring.restore(config, request)


def status(options: argparse.Namespace, config: Settings) -> Any:
    """Say whether the newest backup is new enough and the last run went well."""
    from backup_lib import report

    return report.status(config, quiet=options.json)


def schedule(_options: argparse.Namespace, config: Settings) -> Any:
    """Run backups by cron until SIGTERM: the entrypoint of a container of its own."""
    from backup_lib import schedule as scheduling

    return scheduling.serve(config)


def target(text: str) -> tuple[str, str]:
    """Return PART=WHERE as a pair."""
    part, equals, where = text.partition("=")
    if part not in settings.PARTS or not equals or not where:
        raise argparse.ArgumentTypeError(f"{text} is not PART=WHERE")
    return part, where


def parts(text: str) -> list[str]:
    """Return the parts in a list of them."""
    chosen = text.replace(",", " ").split()
    for part in chosen:
        if part not in settings.PARTS:
            raise argparse.ArgumentTypeError(f"there is no part {part}")
    return chosen


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(
        "backup", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Back up FalkorDB, Valkey and OpenCode's state, and restore them.",
    )  # fmt: skip
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, does: Callable[[argparse.Namespace, Settings], Any]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=str(does.__doc__), description=does.__doc__)
        sub.set_defaults(does=does)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        return sub

    for name, does in (("run", run), ("restore", restore)):
        sub = command(name, does)
        sub.add_argument("--only", type=parts, metavar="PARTS", help="these parts; all of BACKUP_PARTS by default")
        sub.add_argument("--dry-run", action="store_true", help="look, say what would be done, and change nothing")
        if name == "run":
            sub.add_argument("--create", action="store_true", help="the bucket or directory may be created")
            sub.add_argument("--prune", action="store_true", help="then remove what is not kept")
        else:
            sub.add_argument("id", nargs="?", default="latest", help="the beginning of an ID; the newest by default")
            sub.add_argument("--to", type=target, action="append", default=[], metavar="PART=WHERE",
                             help="elsewhere: falkordb=HOST:PORT, opencode=DIRECTORY, files=DIRECTORY")  # fmt: skip
            sub.add_argument("--replace", action="store_true", help="the target holds something: replace it")
    command("list", listing)
    sub = command("verify", verify)
    sub.add_argument("id", nargs="?", default="latest", help="the beginning of an ID; the newest by default")
    sub.add_argument("--all", action="store_true", help="every backup that counts")
    sub = command("prune", prune)
    sub.add_argument("--dry-run", action="store_true", help="say what would be removed")
    command("status", status)
    command("schedule", schedule)
    return top


def main(words: Sequence[str]) -> int:
    """Do what the words say; return the exit code."""
    os.umask(0o077)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        options = parser().parse_args(words)
    except SystemExit as stop:
        return 64 if stop.code else 0
    config: Settings | None = None
    try:
        with children.interruptible():
            config = settings.load(os.environ)
            result = options.does(options, config)
    except Interrupted as signalled:
        say(f"interrupted by signal {signalled.code - 128}")
        return signalled.code
    except OSError as error:
        if not is_full(error):
            raise
        return _failed(full_disk(error.filename or "the working directory"), options, config)
    except Failure as failure:
        return _failed(failure, options, config)
    if options.json:
        print(json.dumps(result))
    return 0


def _failed(failure: Failure, options: argparse.Namespace, config: Settings | None) -> int:
    name, what = type(failure).__name__, config.hide(str(failure)) if config else str(failure)
    print(f"{name}: {what}\n  -> {failure.remedy}", file=sys.stderr)
    if options.json:
        print(json.dumps({"error": name, "exit": failure.code, "said": what, "remedy": failure.remedy}))
    return failure.code
